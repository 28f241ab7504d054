# SPDX-License-Identifier: Apache-2.0
"""A folder is replaced as a whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from optimum_calibprune.publishing import hub
from optimum_calibprune.records import Scores, TaskScore


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_appears_complete(tmp_path: Path) -> None:
    with hub._replaced(tmp_path / "a" / "run", overwrite=False) as new:
        (new / "x").write_text("1")
        assert not (tmp_path / "a" / "run").exists()
    assert _tree(tmp_path) == {"a/run/x": "1"}


def test_an_old_folder_is_replaced_and_nothing_of_it_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("0")
    with hub._replaced(tmp_path / "run", overwrite=True) as new:
        (new / "x").write_text("1")
        assert _tree(tmp_path / "run") == {"old": "0"}
    assert _tree(tmp_path) == {"run/x": "1"}


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()]
)
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("0")
    with pytest.raises(type(failure)), hub._replaced(tmp_path / "run", overwrite=True) as new:
        (new / "x").write_text("1")
        raise failure
    assert _tree(tmp_path) == {"run/old": "0"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("0")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), hub._replaced(tmp_path / "run", overwrite=True) as new:
        (new / "x").write_text("1")
    assert _tree(tmp_path) == {"run/old": "0"}


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    with hub._replaced(tmp_path / "link", overwrite=True) as new:
        (new / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert _tree(tmp_path / "disk") == {"run/x": "1"}


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("1")
    (tmp_path / "file").write_text("1")
    with pytest.raises(FileExistsError, match="not empty"):
        hub.check_output(tmp_path / "full", overwrite=False)
    with pytest.raises(NotADirectoryError, match="is a file"):
        hub.check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OSError, match="MiB are free"):
        hub.check_output(tmp_path / "new", overwrite=False, needed_bytes=2**60)
    monkeypatch.chdir(tmp_path / "full")
    with pytest.raises(OSError, match="current folder"):
        hub.check_output(".", overwrite=True)
    monkeypatch.chdir(tmp_path)
    hub.check_output(tmp_path / "full", overwrite=True)
    hub.check_output(tmp_path / "new" / "deep", overwrite=False)


def scores(*items: float) -> Scores:
    return Scores((TaskScore("t", "code", "pass@1", 0.0, items),))


def saved_scores(folder: Path, **texts: str) -> Path:
    (folder / "scores").mkdir(parents=True)
    for state, text in texts.items():
        (folder / "scores" / f"{state}.json").write_text(text)
    return folder


GOOD = scores(0.0, 1.0).to_json()
DAMAGED = {
    "cut": GOOD[:-20],
    "empty": "",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another record": '{"schema_version": 1, "tasks": [{"task": "t"}]}',
    "no list": GOOD.replace("[\n    0.0,\n    1.0\n   ]", "5"),
    "a word": GOOD.replace("1.0\n", '"1"\n'),
    "not a number": GOOD.replace("1.0\n", "NaN\n"),
    "infinite": GOOD.replace("1.0\n", "1e999\n"),
    "twice": Scores(scores(0.5).tasks * 2).to_json(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_hold_no_scores_are_one_sentence(tmp_path: Path, kind: str) -> None:
    assert DAMAGED[kind] != GOOD
    run = saved_scores(tmp_path / "run", dense=GOOD, sparse=DAMAGED[kind])
    with pytest.raises(ValueError, match=r"run: scores/sparse\.json holds no scores: "):
        hub.load_scores(run)
    (run / "scores" / "sparse.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"holds no scores: UnicodeDecodeError"):
        hub.load_scores(run)


def test_scores_come_back_as_they_were_saved(tmp_path: Path) -> None:
    run = saved_scores(tmp_path / "run", dense=GOOD, sparse=scores(0.0, 0.25).to_json())
    assert hub.load_scores(run) == {"dense": scores(0.0, 1.0), "sparse": scores(0.0, 0.25)}
