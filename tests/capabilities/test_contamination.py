# SPDX-License-Identifier: Apache-2.0
"""What a calibration set gives away of the evaluated items: counted, shown, and refused where it is too much."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optimum_calibprune import CalibPruneConfig, CalibPruner, RunRecord, pocket
from optimum_calibprune.calibration.readers import READERS
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS
from optimum_calibprune.capabilities.contamination import (
    WORD,
    WORDS,
    check_overlaps,
    count_overlaps,
    exempt_sources,
    item_text,
)
from optimum_calibprune.capabilities.harness import load
from optimum_calibprune.publishing.card import render
from optimum_calibprune.records import CalibrationSource, TaskOverlap
from tests.publishing.run_record import example


CLI = str(Path(sys.executable).parent / "optimum-cli")
DATA = Path(__file__).resolve().parents[2] / "../shared/data"
SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def overlapping(text: str, item: str) -> int:
    return count_overlaps({"c4": [text]}, {"t": [item]})[0].overlapping


def test_thirteen_words_in_a_row_are_what_counts() -> None:
    assert len(SENTENCE.split()) == WORDS == 13
    assert overlapping(f"before, {SENTENCE} after", f"Question: {SENTENCE}?") == 1
    assert overlapping(SENTENCE.replace("seven", "7"), SENTENCE) == 0
    assert overlapping(SENTENCE.rpartition(" ")[0] + " no", SENTENCE) == 0


def test_case_punctuation_and_space_do_not_hide_an_item() -> None:
    assert overlapping(SENTENCE.upper().replace(" ", ",\n\n"), f"«{SENTENCE}»") == 1


def test_windows_do_not_cross_samples() -> None:
    words = SENTENCE.split()
    halves = [" ".join(words[:7]), " ".join(words[7:])]
    assert count_overlaps({"c4": halves}, {"t": [SENTENCE]})[0].overlapping == 0
    assert count_overlaps({"c4": [" ".join(halves)]}, {"t": [SENTENCE]})[0].overlapping == 1


def test_items_are_counted_once_by_task_and_by_source() -> None:
    texts = {"c4": [SENTENCE, f"{SENTENCE} {SENTENCE}"], "notes": [SENTENCE + " more"], "other": ["nothing"]}
    items = {"t": [SENTENCE, f"{SENTENCE} more", "short", "x " * 20], "u": ["y " * 13]}
    assert count_overlaps(texts, items, exempt=["notes"]) == (
        TaskOverlap("t", 4, 2, 1, {"c4": 2, "notes": 2}),
        TaskOverlap("u", 1, 0, 0, {}),
    )
    assert count_overlaps({"notes": [SENTENCE]}, items, exempt=["notes"])[0] == TaskOverlap("t", 4, 0, 1, {"notes": 2})
    assert count_overlaps(texts, {}) == ()


def test_an_item_is_its_prompt_its_right_answer_and_its_tests() -> None:
    assert item_text({"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}) == "2 + 2 = 4\n"
    assert item_text({"prompt": "2 + 2 =", "target": 4}) == "2 + 2 =4\n"
    assert item_text({"prompt": "def f():", "tests": "assert f()"}) == "def f():\nassert f()"


def test_too_much_is_refused_with_what_to_do() -> None:
    found = [TaskOverlap("t", 200, 3, 0, {"c4": 3, "self": 90})]
    check_overlaps(found, ["self"], 0.015)
    with pytest.raises(
        ValueError, match=r"3 of 200 items of task 't' share 13 words in a row .* text of c4: 1\.5%, and"
    ):
        check_overlaps(found, ["self"], 0.014)
    with pytest.raises(ValueError, match=r"max_overlap is a share, 0 to 1; 2 was given"):
        CalibPruneConfig("pocket", max_overlap=2)


def test_generators_and_the_model_itself_are_exempt() -> None:
    sources = [
        CalibrationSource("a", "code"),
        CalibrationSource("b", "code", upper_bound=True),
        CalibrationSource("c", "any", written="self-cal"),
    ]
    assert exempt_sources(sources) == {"b", "c"}


@pytest.mark.skipif(not DATA.exists(), reason="needs the real data")
def test_known_overlaps_of_real_sets_are_found() -> None:
    """The training set of GSM8K is known to hold near copies of 3 test items; TheAlgorithms shares code with the others."""

    def read(path: str) -> list[dict]:
        return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").split("\n") if line]

    texts = {name: [row["text"] for row in read(f"calibration/{name}.jsonl")] for name in ("gsm8k", "thealgorithms")}
    items = {
        "gsm8k": [row["question"] for row in read("evaluation/gsm8k_test.jsonl")],
        "humaneval": [row["prompt"] + row["canonical_solution"] for row in read("evaluation/humaneval.jsonl")],
        "mbpp": [row["prompt"] + "\n" + row["code"] for row in read("evaluation/mbpp_test.jsonl")],
    }
    found = {entry.task: entry.sources for entry in count_overlaps(texts, items)}
    assert found == {"gsm8k": {"gsm8k": 3}, "humaneval": {"thealgorithms": 3}, "mbpp": {"thealgorithms": 3}}


@pytest.mark.skipif(not DATA.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("hellaswag", "hellaswag"),
        ("winogrande", "winogrande"),
        ("gsm8k", "gsm8k"),
        ("mbpp", "mbpp"),
        ("arc_easy", "arc"),
        ("arc_challenge", "arc"),
    ],
)
def test_every_item_that_a_reader_leaks_is_found_unless_it_is_short(name: str, reader: str) -> None:
    task = load(replace(BENCHMARKS[name], data=DATA / "evaluation", limit=200))
    items = list({request.doc_id: request.doc for request in task.requests()}.values())
    if name == "hellaswag":
        items = [item | {"ctx": item["ctx_a"]} for item in items]
    leaks = [READERS[reader](item) for item in items]
    long = [len(WORD.findall(text)) >= WORDS for text in leaks]
    found = [
        count_overlaps({"leak": [text]}, {name: [item]})[0] for text, item in zip(leaks, task.texts(), strict=True)
    ]
    assert [bool(entry.overlapping) for entry in found] == long
    assert [entry.short for entry in found] == [int(not enough) for enough in long]
    assert sum(long) > 150


# ------------------------------------------------------------------------------------------- end to end


def leak(folder: Path) -> Path:
    """Half a source of real text, and the questions of the code probes."""
    probes = [json.loads(line) for line in pocket.probes()["code"].read_text().splitlines()]
    path = folder / "leak.jsonl"
    path.write_text("".join(json.dumps({"text": row["prompt"] + row["target"]}) + "\n" for row in probes))
    return path


def test_a_leak_is_refused_unless_asked_for_and_then_shown(tmp_path: Path) -> None:
    command = [CLI, "calibprune", "prune", "pocket", "--sources", f"leak={leak(tmp_path)}:code", "--mix", "uniform"]
    command += ["--capabilities", "code", "--samples", "16", "--length", "128", "--output", "out"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert refused.returncode == 1
    assert "items of task 'pocket_code' share 13 words in a row with the calibration text of leak" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(
        [*command, "--max-overlap", "0.9"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = RunRecord.from_json((tmp_path / "out" / "calibprune.json").read_text())
    (found,) = record.overlaps
    assert found.task == "pocket_code"
    assert found.overlapping == found.sources["leak"] > 20
    assert "--max-overlap 0.9" in record.command
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `pocket_code` | 400 | {found.overlapping} (" in card
    for state in ("dense", "sparse"):
        scores = json.loads((tmp_path / "out" / "scores" / f"{state}.json").read_text())
        assert len(scores["tasks"][0]["fingerprint"]) == 64


def test_what_a_refusal_advises_is_allowed() -> None:
    """Also where it is no round number: 457 of 2376 are a little more than 19.2 %."""
    found = [TaskOverlap("t", 2376, 457, 0, {"a": 457})]
    with pytest.raises(ValueError, match="457 of 2376 items") as refused:
        check_overlaps(found, [], 0.1)
    advised = re.search(r"allow it with max_overlap=([0-9.]+) or more", str(refused.value))[1]
    check_overlaps(found, [], float(advised))


def test_the_generators_texts_are_exempt_by_their_label() -> None:
    options = {"samples": 16, "length": 128, "capabilities": "code"}
    pruner = CalibPruner.from_pretrained("pocket", mix="single:pocket_code", **options)
    (found,) = pruner.prune().overlaps
    assert (found.overlapping, found.short) == (0, 0)
    assert found.sources["pocket_code"] > 20
    card = render(pruner.record)
    assert (
        f"| `pocket_code` | 400 | 0 (0.0 %) | 0 | `pocket_code` {found.sources['pocket_code']} (upper bound) |" in card
    )


def test_a_card_of_an_older_run_says_nothing() -> None:
    old = json.loads(example().to_json())
    del old["overlaps"], old["config"]["max_overlap"]
    record = RunRecord.from_json(json.dumps(old))
    assert record == replace(example(), overlaps=())
    assert "13 words" not in render(record)
