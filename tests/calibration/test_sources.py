# SPDX-License-Identifier: Apache-2.0
"""Every form of a local source becomes a pool of windows that are cut as the definition says, or one clear sentence."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.calibration import sources
from optimum_calibprune.calibration.sources import SOURCES, OpenSource, Pool, build_pool, open_sources, rows
from optimum_calibprune.records import CalibrationSource


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LENGTH = 16
TEXTS = [f"Sentence {i} of many tells of a ship, {i * 7} birds and the sea." for i in range(300)]
ROWS = [{"text": text} for text in TEXTS]
EOS = 0  # of the pocket's tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.MODEL)


@pytest.fixture
def pool(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Pool]:
    """The pool of the only source among `given`."""

    def build(given: Any, wanted: int = 4, length: int = LENGTH, **options: Any) -> Pool:
        (opened,) = open_sources(given)
        return build_pool(opened, tokenizer, length, wanted, **options)

    return build


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def split(ids: np.ndarray) -> list[list[int]]:
    """The documents between the end tokens; the last may be cut."""
    parts: list[list[int]] = [[]]
    for i in ids.reshape(-1).tolist():
        if i == EOS:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def lines(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def write(path: Path, items: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(item["text"] for item in items))
    else:
        path.write_text(json.dumps(items) if path.suffix == ".json" else lines(items))
    return path


def generated() -> Iterator[dict[str, str]]:
    yield from ROWS


def forms(folder: Path) -> dict[str, Any]:
    """The same documents in every form that is accepted."""
    several = folder / "several"
    for i, suffix in enumerate([".jsonl", ".json", ".txt", ".parquet"]):
        write(several / "deep" / f"part{suffix}", ROWS[75 * i : 75 * (i + 1)])
    (several / "notes.md").write_text("not read")
    (several / "nothing.jsonl").touch()
    return {
        "jsonl": [str(write(folder / "a.jsonl", ROWS))],
        "json array": [str(write(folder / "a.json", ROWS))],
        "txt": [str(write(folder / "a.txt", ROWS))],
        "parquet": [str(write(folder / "a.parquet", ROWS))],
        "folder": [str(several)],
        "name=path:capability": [f"a={write(folder / 'b.jsonl', ROWS)}:code"],
        "source with path": [CalibrationSource("a", "code", path=str(write(folder / "c.jsonl", ROWS)))],
        "source with template": [
            CalibrationSource("a", "code", path=str(write(folder / "d.jsonl", [{"t": t} for t in TEXTS])), text="{t}")
        ],
        "list of texts": {"a:code": TEXTS},
        "tuple of texts": {"a:code": tuple(TEXTS)},
        "array of texts": {"a:code": np.array(TEXTS)},
        "list of rows": {"a:code": ROWS},
        "Dataset": {"a:code": datasets.Dataset.from_list(ROWS)},
        "IterableDataset": {"a:code": datasets.IterableDataset.from_generator(generated)},
    }


FORMS = [
    "jsonl",
    "json array",
    "txt",
    "parquet",
    "folder",
    "name=path:capability",
    "source with path",
    "source with template",
    "list of texts",
    "tuple of texts",
    "array of texts",
    "list of rows",
    "Dataset",
    "IterableDataset",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_windows_cut_from_its_documents(
    form: str, pool: Callable[..., Pool], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = pool(forms(tmp_path)[form], wanted=10)
    assert made.input_ids.dtype == np.int64
    assert made.input_ids.shape == (40, LENGTH)
    known = encoded(tokenizer, TEXTS)
    *whole, last = split(made.input_ids)
    places = [known.index(document) for document in whole]
    assert len(set(places)) == len(places) >= 20, "no document is read twice"
    assert not last or any(document[: len(last)] == last for document in known)
    assert min(places) < 75 <= 225 < max(places), "documents come from all over the source"
    assert places != sorted(places)
    assert made.source.pool["windows"] == "40"
    assert int(made.source.pool["documents"]) >= len(whole)


def test_every_form_is_tested(tmp_path: Path) -> None:
    assert list(forms(tmp_path)) == FORMS


def test_a_path_alone_is_general_and_bears_the_name_of_its_file(tmp_path: Path) -> None:
    path = str(write(tmp_path / "essays.jsonl", ROWS))
    named = f"mine={path}:math"
    assert [(o.source.name, o.source.capability, o.source.path) for o in open_sources([path, named])] == [
        ("essays", "general", path),
        ("mine", "math", path),
    ]


def test_a_name_of_the_table_is_its_source() -> None:
    assert [opened.source for opened in open_sources(list(SOURCES))] == list(SOURCES.values())
    own = CalibrationSource("own", "code", repo="me/own")
    assert open_sources(["own"], {"own": own}) == [OpenSource(own)]


@pytest.mark.parametrize("name", ["a=b.jsonl", "a:b.jsonl", "a=b:c.jsonl", "a[1].jsonl", "a*?.jsonl", "#a %20.jsonl"])
def test_a_path_may_hold_any_sign(name: str, pool: Callable[..., Pool], tmp_path: Path) -> None:
    write(tmp_path / "a1.jsonl", [{"text": "The file that a pattern would find."}] * 100)
    path = write(tmp_path / name, ROWS)
    alone, named = pool([str(path)]), pool([f"n={path}:code"])
    assert np.array_equal(alone.input_ids, named.input_ids)
    assert [row["text"] for row in rows(OpenSource(named.source), shuffle=False)[1]] == TEXTS


def test_a_file_that_changed_is_read_again(pool: Callable[..., Pool], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    before = pool([str(path)])
    write(path, [{"text": text.upper()} for text in TEXTS])
    assert not np.array_equal(pool([str(path)]).input_ids, before.input_ids)


# --------------------------------------------------------------------------------------- ready token ids


def id_forms(ids: np.ndarray) -> dict[str, Any]:
    return {
        "lists": ids.tolist(),
        "array": ids,
        "small integers": ids.astype(np.int16),
        "tensor": torch.from_numpy(ids),
        "list of arrays": list(ids),
        "rows": [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()],
        "dataset": datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        "tensors of a dataset": datasets.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"),
    }


@pytest.mark.parametrize("form", list(id_forms(np.zeros((1, 1), dtype=np.int64))))
def test_rows_of_exactly_the_length_stay_as_they_are(form: str, pool: Callable[..., Pool]) -> None:
    ids = np.random.default_rng(0).integers(0, 2048, (40, LENGTH))
    made = pool({"a:code": id_forms(ids)[form]}, wanted=10)
    assert sorted(made.input_ids.tolist()) == sorted(ids.tolist())


def test_other_rows_are_packed_beside_those_of_exactly_the_length(pool: Callable[..., Pool]) -> None:
    exact = [[100 + i] * LENGTH for i in range(10)]
    short = [[500 + i] * 5 for i in range(60)]
    mixed = [row for pair in zip(short, exact * 6, strict=True) for row in pair]
    made = pool({"a:code": mixed[:20] + short[10:]}, wanted=10).input_ids
    ready = [row for row in made.tolist() if row in exact]
    packed = np.array([row for row in made.tolist() if row not in exact])
    assert sorted(ready) == exact
    assert all(document in short for document in split(packed)[:-1])
    assert len(ready) + len(packed) == 10 + (60 * 6 - 1) // LENGTH


def test_texts_that_fill_a_window_exactly_are_still_joined(
    pool: Callable[..., Pool], tokenizer: PreTrainedTokenizerBase
) -> None:
    text = tokenizer.decode(encoded(tokenizer, [TEXTS[7]])[0][:LENGTH])
    (ids,) = encoded(tokenizer, [text])
    assert len(ids) == LENGTH
    made = pool({"a:code": [text] * 20}, wanted=4).input_ids.reshape(-1).tolist()
    assert made == ([*ids, EOS] * 20)[: 16 * LENGTH]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.arange(64), "'int' object is not iterable"),
        (np.ones((40, LENGTH)), "'float' object cannot be interpreted as an integer"),
        (torch.zeros(4, 4, LENGTH, dtype=torch.int64), "'list' object cannot be interpreted as an integer"),
        ([["split", "words"]] * 40, "'str' object cannot be interpreted as an integer"),
        ([None] * 40, "'NoneType' object is not iterable"),
    ],
)
def test_rows_that_are_no_documents_are_refused(data: Any, said: str, pool: Callable[..., Pool]) -> None:
    with pytest.raises(ValueError, match=f"row of source 'a' is neither a text.*{re.escape(said)}"):
        pool({"a:code": data})


@pytest.mark.parametrize("wrong", [-1, 2048])
def test_ids_outside_the_vocabulary_are_refused(wrong: int, pool: Callable[..., Pool]) -> None:
    ids = np.zeros((16, LENGTH), dtype=np.int64)
    ids[0, 0], ids[1, 1] = 2047, wrong
    with pytest.raises(ValueError, match=rf"Source 'a' holds token id {wrong}; .* has ids 0 to 2047\."):
        pool({"a:code": ids}, vocabulary=2048)
    ids[1, 1] = 0
    assert pool({"a:code": ids}, vocabulary=2048).input_ids.max() == 2047


# ------------------------------------------------------------------------------------------------ pools


def test_windows_are_the_joined_documents_cut_without_padding(
    pool: Callable[..., Pool], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = TEXTS[:20]
    made = pool({"a:code": texts}, wanted=20, length=10).input_ids
    order = np.random.default_rng(sources.POOL_SEED).permutation(20)
    joined: list[int] = []
    for i in order:
        joined += [*encoded(tokenizer, [texts[i]])[0], EOS]
    joined.pop()  # the end token stands between documents
    assert len(joined) // 10 < 80, "all of the source is used"
    assert made.reshape(-1).tolist() == joined[: len(joined) // 10 * 10]


def test_the_last_end_token_fills_no_window(pool: Callable[..., Pool]) -> None:
    with pytest.raises(ValueError, match=r"its 1 documents give 0 \(7 tokens\)"):
        pool({"a:code": [[5] * 7]}, wanted=1, length=8)
    made = pool({"a:code": [[5] * 4, [5] * 3]}, wanted=1, length=8).input_ids
    assert made.sum() == 7 * 5
    assert (made[:, [0, -1]] == 5).all()


def test_reading_stops_when_four_times_the_windows_are_there(pool: Callable[..., Pool]) -> None:
    taken = []

    def endless() -> Iterator[dict[str, str]]:
        for i in range(10**6):
            taken.append(i)
            yield {"text": f"{i} " * 40}

    stream = datasets.IterableDataset.from_generator(endless)
    made = pool({"a:code": stream}, wanted=5)
    assert made.input_ids.shape == (20, LENGTH)
    assert len(taken) < sources.SHUFFLE_BUFFER + 200
    assert made.source.pool["shuffle_buffer"] == str(sources.SHUFFLE_BUFFER)
    assert made.source.pool["datasets"] == datasets.__version__


def test_a_source_with_fewer_than_four_times_the_windows_gives_what_it_has(pool: Callable[..., Pool]) -> None:
    assert pool({"a:code": np.ones((7, LENGTH), dtype=int)}, wanted=6).input_ids.shape == (7, LENGTH)


def test_too_little_text_is_refused_with_how_much_there_was(pool: Callable[..., Pool]) -> None:
    with pytest.raises(
        ValueError, match=r"'a' is too short: 9 samples of 16 tokens .* 7 documents give 7 \(112 tokens\)"
    ):
        pool({"a:code": np.ones((7, LENGTH), dtype=int)}, wanted=9)


def test_the_same_source_gives_the_same_pool(pool: Callable[..., Pool], tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", ROWS))
    assert np.array_equal(pool([path]).input_ids, pool([path]).input_ids)


def test_empty_documents_are_skipped(pool: Callable[..., Pool], tmp_path: Path) -> None:
    empty: list[Any] = [{"text": ""}, {"text": " \n\t"}, {"text": None}]
    path = write(tmp_path / "a.jsonl", [row for pair in zip(ROWS, empty * 100, strict=True) for row in pair])
    made = pool([str(path)], wanted=200)
    assert made.source.pool["documents"] == "300"
    assert all(split(made.input_ids)), "no end token follows another"
    ids = pool({"a:code": [[5, 6], [], [7, 8, 9]] * 20}, wanted=1).input_ids
    assert all(split(ids))


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_huge_document_is_read_in_pieces_from_all_over_it(
    suffix: str, pool: Callable[..., Pool], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sources, "LONGEST_TEXT", 2000)
    huge = "\n".join(f"Line {i} of the log tells of {i * i} birds." for i in range(4000))
    path = write(tmp_path / f"a{suffix}", [{"text": huge}])
    made = pool([str(path)], wanted=100)
    assert made.input_ids.shape == (400, LENGTH)
    places = [huge.index(tokenizer.decode(part)) for part in split(made.input_ids)[:-1]]
    assert len(places) < len(huge) // 2000, "not all of it is tokenised"
    assert {place * 2 // len(huge) for place in places} == {0, 1}
    assert places != sorted(places)


def test_a_document_is_not_cut_without_need(pool: Callable[..., Pool], tokenizer: PreTrainedTokenizerBase) -> None:
    text = " ".join(TEXTS * 20)
    assert 2**18 < len(text) < sources.LONGEST_TEXT
    made = pool({"a:code": [text]}, wanted=5).input_ids.reshape(-1).tolist()
    assert made == encoded(tokenizer, [text])[0][: len(made)]


def test_progress_reaches_its_total(pool: Callable[..., Pool]) -> None:
    for texts in TEXTS, TEXTS[:12]:
        seen: list[tuple[int, int, str]] = []
        pool({"a:code": texts}, wanted=10, on_progress=lambda *step, seen=seen: seen.append(step))
        assert seen[-1] == (40, 40, "a")
        assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
        assert {step[1:] for step in seen} == {(40, "a")}


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = AutoTokenizer.from_pretrained(pocket.MODEL)
    bare.eos_token = None
    (opened,) = open_sources({"a:code": TEXTS})
    with pytest.raises(ValueError, match=r"no end-of-sequence token .* set tokenizer\.eos_token"):
        build_pool(opened, bare, LENGTH, 1)


def test_a_chat_without_template_warns_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    chats = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    source = CalibrationSource("a", "code", path=str(write(tmp_path / "a.jsonl", chats)), text="chat:messages")
    with caplog.at_level(logging.WARNING, sources.__name__):
        build_pool(OpenSource(source), tokenizer, LENGTH, 10)
    assert [record.message for record in caplog.records] == [
        "The tokenizer has no chat template; the messages of a chat are joined by blank lines."
    ]


def test_files_of_a_folder_give_the_columns_that_they_share(pool: Callable[..., Pool], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    write(tmp_path / "a.txt", ROWS)
    assert pool([str(tmp_path)], wanted=300).source.pool["documents"] == "600"


# ----------------------------------------------------------------------------------------------- errors

TYPES = r"\.jsonl, \.json, \.txt, \.parquet"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["gsm8"],
            r"Unknown source 'gsm8'\. Did you mean 'gsm8k'\? Allowed: c4, .*, a path, NAME=PATH:CAPABILITY, hub:ID\.",
        ),
        (["c4", "c4"], "Two sources are named 'c4'; give each its own name with NAME=PATH:CAPABILITY"),
        (["a={there}:kode"], r"Unknown capability of source 'a' 'kode'\. Did you mean 'code'\? Allowed: general,"),
        (["a={there}"], "does not name a capability; allowed: NAME=PATH:CAPABILITY"),
        (["={there}:code"], "A source needs a name"),
        (["a={folder}/none.jsonl:code"], "There is no file or folder '.*none.jsonl'"),
        (["{folder}/none.jsonl"], "There is no file or folder '.*none.jsonl'"),
        (["none.txt"], "There is no file or folder 'none.txt'"),
        (["me/none"], "There is no file or folder 'me/none'"),
        (["{folder}/table.csv"], rf"'.*table.csv' holds nothing to read; allowed: {TYPES} with text inside\."),
        (["{folder}/empty"], f"'.*empty' holds nothing to read; allowed: {TYPES}"),
        (["{folder}/empty.jsonl"], f"'.*empty.jsonl' holds nothing to read; allowed: {TYPES}"),
        ([CalibrationSource("a", "code", path="none.jsonl")], "There is no file or folder 'none.jsonl'"),
        ([CalibrationSource("a", "code")], "Source 'a' has neither a repo nor a path; give one of them"),
        ({"a": TEXTS}, r"Data in memory needs its capability: 'a:CAPABILITY', one of \('general',"),
        ({"a:kode": TEXTS}, r"Unknown capability of source 'a' 'kode'\. Did you mean 'code'"),
        ({"a:code": "there.jsonl"}, "Source 'a' is of type str; allowed: a list of texts"),
        ({"a:code": {"text": TEXTS}}, "Source 'a' is of type dict; allowed: a list of texts"),
        ({"a:code": None}, "Source 'a' is of type NoneType; allowed"),
        ({"a:code": datasets.DatasetDict()}, "Source 'a' is of type DatasetDict; .* one split of a `datasets` object"),
        ({"a:code": TEXTS, "a:math": TEXTS}, "Two sources are named 'a'"),
    ],
)
def test_what_cannot_be_a_source_is_refused_before_anything_is_read(given: Any, said: str, tmp_path: Path) -> None:
    there = write(tmp_path / "there.jsonl", ROWS)
    (tmp_path / "table.csv").write_text("text\nhello\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    if isinstance(given, list):
        given = [g.format(there=there, folder=tmp_path) if isinstance(g, str) else g for g in given]
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        open_sources(given)
    assert "\n" not in str(error.value)


BAD_FILES = {
    "malformed.jsonl": (
        lines(ROWS) + '{"text": "x" bad}\n',
        "malformed.jsonl cannot be read: JSON parse error: .* 300",
    ),
    "column.jsonl": ('{"txt": "x", "id": 1}\n', r"source 'column' .* '{text}': 'text' is missing\. .* are: txt, id\."),
    "columns.json": ('{"text": ["a", "b"]}', "source 'columns' .*: 'text' holds a list, not a text"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n' * 9, "latin.jsonl cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "nothing.json": ("[]", "nothing.json cannot be read: .*no data"),
    "blank.jsonl": ("\n\n", "blank.jsonl cannot be read: .*no data"),
    "blank.txt": (" \n\n \n", r"'blank' is too short: .* 0 documents give 0 \(0 tokens\)"),
    "no.parquet": ("no parquet", "no.parquet cannot be read: .*Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_in_one_sentence(
    name: str, pool: Callable[..., Pool], tmp_path: Path
) -> None:
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        pool([str(tmp_path / name)])
    assert "\n" not in str(error.value)


BAD_FOLDERS = {
    "no shared column": ({"a.jsonl": '{"txt": "x"}\n', "a.txt": "x"}, "its files have no column in common"),
    "two types": ({"a.jsonl": '{"text": 1}\n', "a.txt": "x"}, "unexpected type"),
    "two schemas": ({"a.jsonl": '{"text": "x"}\n', "b.jsonl": '{"text": "x", "id": 1}\n'}, "column names don't match"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_whose_files_do_not_fit_together_is_refused(
    case: str, pool: Callable[..., Pool], tmp_path: Path
) -> None:
    files, said = BAD_FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: .*{said}"):
        pool([str(tmp_path)])
