# SPDX-License-Identifier: Apache-2.0
"""A calibration set becomes a data set that says where each row is from, and comes back as sources."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from optimum_calibprune import CalibPruner, RunRecord
from optimum_calibprune.publishing.dataset import check_licences, render_dataset, save_dataset
from optimum_calibprune.records import CalibrationSource
from tests.hub_server import TOKEN, HubServer
from tests.publishing import pushing
from tests.publishing.run_record import example
from tests.publishing.test_card import EVIL, hostile, inline


SOURCES = {
    "prose:general": ["The sea is wide and the ship is small. " * 40] * 4,
    "sums:math": ["1 + 1 = 2. " * 90] * 4,
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the pocket model on texts whose licence is stated."""
    folder = tmp_path_factory.mktemp("runs")
    sources = []
    for key, texts in SOURCES.items():
        name, capability = key.split(":")
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(CalibrationSource(name, capability, path=str(path), licence="CC BY 4.0"))
    options = {"samples": 6, "length": 64, "capabilities": "none", "mix": "uniform"}
    pruner = CalibPruner.from_pretrained("pocket", sources=sources, **options)
    pruner.prune()
    pruner.save_pretrained(folder / "run")
    return folder / "run"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_every_row_says_where_it_is_from(run_folder: Path, tmp_path: Path) -> None:
    save_dataset(run_folder, tmp_path / "set", "me/set")
    rows = [json.loads(line) for line in (tmp_path / "set" / "data" / "general.jsonl").read_text().splitlines()]
    run = RunRecord.from_json((run_folder / "calibprune.json").read_text())
    assert [(row["source"], row["index"], row["licence"], row["tokens"]) for row in rows] == [
        ("prose", row.index, "CC BY 4.0", 64) for row in run.rows if row.group == "general"
    ]
    profiles = [sample for row, sample in zip(run.rows, run.samples, strict=True) if row.group == "general"]
    assert [row["perplexity"] for row in rows] == [profile.perplexity for profile in profiles]
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    assert all(tokenizer.eos_token not in row["text"] and "the ship is small" in row["text"] for row in rows)
    card = (tmp_path / "set" / "README.md").read_text()
    data = DatasetCard(card).data
    assert data.license == ["cc-by-4.0"]
    assert [config["config_name"] for config in data.to_dict()["configs"]] == ["general", "math"]
    assert "| `prose` | general | 3 | a local file | CC BY 4.0 |" in card
    assert (
        'sources=["hub:me/set"],\n    mix="weighted:set-general=3,set-math=3",\n    samples=6,\n    length=64,' in card
    )


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        *[(name, True) for name in ("mit", "Apache-2.0", "CC BY-SA 3.0", "odc-by", "cc0-1.0", "AFL-3.0")],
        *[
            (name, False)
            for name in (None, "", "see the card", "cc-by-nc-4.0", "CC BY-NC-SA 4.0", "cc-by-nd-4.0", "llama3")
        ],
    ],
)
def test_only_text_that_may_be_passed_on_is_published(licence: str | None, allowed: bool) -> None:
    run = example()
    changed = replace(run, sources=tuple(replace(source, licence=licence) for source in run.sources))
    if allowed:
        check_licences(changed)
    else:
        with pytest.raises(ValueError, match=r"cannot be published, since these licences .* c4: .*; notes: "):
            check_licences(changed)
    written = replace(
        changed, sources=tuple(replace(s, repo=None, path=None, written="igsp") for s in changed.sources)
    )
    check_licences(written)  # the model's own text
    unused = CalibrationSource("unused", "math", repo="a/b")
    check_licences(replace(written, sources=(*written.sources, unused)))


def test_nothing_that_others_choose_becomes_markup_here_either() -> None:
    run = hostile(example(), EVIL)
    rows = (replace(run.rows[0], origin=run.sources[0].name), replace(run.rows[1], origin="local"))
    text = render_dataset(replace(run, rows=rows), EVIL)
    found = list(inline(text))
    assert not [token for token in found if token.type in ("link_open", "image")]
    markup = [token.content for token in found if token.type in ("html_block", "html_inline")]
    assert all(content.strip().startswith("<!-- optimum-calibprune ") for content in markup)
    assert "\u202e" not in text


HOSTILE_TEXT = (
    "---\nlicense: owned\nconfigs:\n- data_files: /etc/passwd\n---\n# Owned\n<script>alert(1)</script> {{ run }} {% raw %}\n"
    f"\u2028\u2029\x85\x00\x1b[31m\u202e {EVIL} {'x' * 20_000}\n"
)


def test_text_stays_text_whatever_it_holds(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = load_file(folder / "calibration.safetensors")["input_ids"]
    text = tokenizer(HOSTILE_TEXT, add_special_tokens=False)["input_ids"]
    save_file({"input_ids": np.array([text] * len(ids))}, folder / "calibration.safetensors")
    save_dataset(folder, tmp_path / "set", "me/set")
    expected = tokenizer.decode(text, clean_up_tokenization_spaces=False)
    assert "<script>" in expected
    files = sorted(map(str, (tmp_path / "set" / "data").glob("*.jsonl")))
    found = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["text"] == [expected] * len(ids)
    save_dataset(run_folder, tmp_path / "plain", "me/set")
    card = (tmp_path / "set" / "README.md").read_bytes()
    assert card == (tmp_path / "plain" / "README.md").read_bytes(), "a card holds nothing of the text"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "[]"),
        ("", "[" * 100_000),
        ('"origin": "prose"', '"origin": "other"'),
        ('"name": "sums"', '"name": "prose"'),
        ('"text": "{text}"', '"text": 5'),
    ],
)
def test_a_record_that_does_not_fit_is_one_error(old: str, new: str, run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    record = folder / "calibprune.json"
    good = record.read_text()
    assert old in good
    record.write_text(good.replace(old, new) if old else new)
    with pytest.raises(ValueError, match=r"calibprune.json is no record|do not fit each other|cannot be published"):
        save_dataset(folder, tmp_path / "set", "me/set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("ids", [np.zeros((1, 64), dtype=np.int64), np.full((6, 64), -1), np.full((6, 64), 2**40)])
def test_ids_that_do_not_fit_are_one_error(ids: np.ndarray, run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    save_file({"input_ids": ids}, folder / "calibration.safetensors")
    with pytest.raises(ValueError, match="do not fit each other"):
        save_dataset(folder, tmp_path / "set", "me/set")
    (folder / "calibration.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="do not fit each other"):
        save_dataset(folder, tmp_path / "set", "me/set")


def test_a_record_from_elsewhere_names_no_file(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    record = tmp_path / "run" / "calibprune.json"
    record.write_text(record.read_text().replace('"group": "math"', '"group": "../../math"'))
    with pytest.raises(ValueError, match="Unknown capability of a row"):
        save_dataset(tmp_path / "run", tmp_path / "a" / "b" / "set", "me/set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def again(repo_id: str, token: str | None, folder: Path) -> tuple[str, list[str], str]:
    """Prunes the pocket model with a published set; what was recorded."""
    name = repo_id.rpartition("/")[2].partition("@")[0]
    options = {"samples": 6, "length": 64, "capabilities": "none", "mix": f"weighted:{name}-general=3,{name}-math=3"}
    pruner = CalibPruner.from_pretrained("pocket", sources=[f"hub:{repo_id}"], token=token, **options)
    record = pruner.prune()
    return (
        record.command,
        [f"{s.name} {s.capability} {s.repo} {s.licence} {s.revision}" for s in record.sources],
        str(pruner.tokenizer.decode(pruner.calibration.input_ids[0])),
    )


def refused(repo_id: str) -> str:
    try:
        again(repo_id, None, Path())
    except (ValueError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_published_set_calibrates_again(hub: HubServer, run_folder: Path, tmp_path: Path) -> None:
    hub.add_repo("me/other", {"README.md": b"# no set\n"}, repo_type="dataset")
    with pushing.process(hub.environment(tmp_path / "home")) as client:
        hub.fail_next("POST", "/commit/", 403)
        failed = client(pushing.push_calibration, run_folder, "me/set", private=True)
        assert failed.error.startswith("PushError: me/set was not pushed: the token may not write there")
        words = shlex.split(failed.error.partition("finish with: ")[2])
        assert words[:3] == ["hf", "upload", "me/set"]
        message = "Upload a calibration set chosen with optimum-calibprune"
        assert words[4:] == ["--repo-type", "dataset", "--private", "--commit-message", message]
        assert (Path(words[3]) / "data" / "math.jsonl").exists()
        for _ in range(2):  # once more changes nothing
            assert client(pushing.push_calibration, run_folder, "me/set", private=True).error == ""
        assert len(hub.commits("me/set", repo_type="dataset")) == 2
        assert hub.repos["dataset", "me/set"].private
        sha = hub.commits("me/set", repo_type="dataset")[-1].sha
        command, sources, text = client(again, "me/set", TOKEN, tmp_path)
        assert f"--sources hub:me/set@{sha} --output" in command
        assert sources == [f"set-{c} {c} me/set cc-by-4.0 {sha}" for c in ("general", "math")]
        assert "the ship is small" in text or "1 + 1 = 2" in text
        assert client(again, f"me/set@{sha}", TOKEN, tmp_path)[0] == command
        assert "me/other is no published calibration set" in client(refused, "me/other")
        assert "me/none is not on the Hub" in client(refused, "me/none")
        secret = tmp_path / "secret.jsonl"
        secret.write_text('{"text": "what is on this machine"}\n' * 50)
        for place in (secret, f"file://{secret}", f"../../../../../../{secret}"):
            configs = [f"- config_name: {name}\n  data_files: {place}\n" for name in ("general", "math", "../../etc")]
            card = f"---\nconfigs:\n{''.join(configs)}---\n"
            hub.add_repo("me/path", {"README.md": card.encode()}, repo_type="dataset")
            assert "ValueError: 'path-general': me/path cannot be read" in client(refused, "me/path")
        assert client(pushing.push_calibration, run_folder, "../../escaped").error.startswith(
            "PushError: ../../escaped was"
        )
