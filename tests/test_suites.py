# SPDX-License-Identifier: Apache-2.0
"""Suites, tasks, limits and local data: what a config asks for, and both commands with them, as a user runs them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_calibprune import CalibPruneConfig, CalibPruner, RunRecord, pocket
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS
from optimum_calibprune.capabilities.perplexity import WIKITEXT2
from optimum_calibprune.capabilities.retention import report_of_both
from optimum_calibprune.capabilities.sandbox import isolation
from optimum_calibprune.choices import choose_perplexity_text, choose_tasks
from optimum_calibprune.publishing.reproduce import command, public_config
from optimum_calibprune.records import BaseModel, Scores, TaskScore
from tests.hub_server import HubServer


CLI = str(Path(sys.executable).parent / "optimum-cli")
SMALL = ["--samples", "8", "--length", "64", "--mix", "uniform"]
PIQA = [{"goal": f"Add {i} and {i}", "sol1": str(2 * i), "sol2": str(2 * i + 1), "label": i % 2} for i in range(12)]
MBPP = [{"task_id": i, "text": "Return one.", "code": "", "test_list": ["assert one() == 1"] * 3} for i in range(3)]
OWN = """
task: own_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def own(folder: Path, name: str) -> str:
    """A task of lm-eval over 80 of the pocket's probes, which it can do."""
    probes = pocket.probes()[name].read_text().splitlines()[:80]
    (folder / f"{name}.jsonl").write_text("\n".join(probes) + "\n")
    (folder / f"own_{name}.yaml").write_text(OWN.format(name=name, path=folder / f"{name}.jsonl"))
    return f"own_{name}.yaml:{name}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa_val.jsonl").write_text(lines(PIQA))
    (folder / "mbpp.jsonl").write_text(lines(MBPP))
    return folder


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"HF_HOME": str(cwd / "home")}
    return subprocess.run(
        [CLI, "calibprune", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=os.environ | kept | environment,
    )


WITHOUT_CODE = [name for name, benchmark in BENCHMARKS.items() if benchmark.capability != "code"]
POCKET = ["pocket_general", "pocket_commonsense", "pocket_code", "pocket_math"]


@pytest.mark.parametrize(
    ("model", "options", "names", "limit"),
    [
        ("pocket", {}, POCKET, None),
        ("other/model", {}, WITHOUT_CODE, 200),
        ("pocket", {"suite": "quick"}, WITHOUT_CODE, 200),
        ("other/model", {"suite": "full"}, WITHOUT_CODE, None),
        ("other/model", {"suite": "full", "limit": 7, "allow_code_execution": True}, list(BENCHMARKS), 7),
        ("pocket", {"suite": "pocket"}, POCKET, None),
        (str(pocket.MODEL), {"suite": "pocket"}, POCKET, None),
        ("other/model", {"suite": "pocket"}, ["pocket_general", "pocket_commonsense", "pocket_math"], None),
        ("other/model", {"suite": "pocket", "allow_code_execution": True}, POCKET, None),
        ("other/model", {"tasks": "piqa"}, ["piqa"], None),
        ("other/model", {"tasks": ["piqa", "sciq"], "suite": "quick"}, ["piqa", "sciq"], 200),
        ("pocket", {"tasks": ["piqa", "pocket_math"]}, ["piqa", "pocket_math"], None),
        ("other/model", {"capabilities": "math", "limit": 3}, ["gsm8k", "minerva_math500"], 3),
        ("other/model", {"capabilities": "code", "allow_code_execution": True}, ["humaneval", "mbpp"], 200),
        ("other/model", {"capabilities": "none"}, [], None),
    ],
)
def test_what_a_config_asks_for(model: str, options: dict[str, Any], names: list[str], limit: int | None) -> None:
    found = choose_tasks(CalibPruneConfig(model, **options))
    assert [task.name for task in found.tasks] == names
    assert {getattr(task, "limit", None) for task in found.tasks} <= {limit, None}
    assert any(getattr(task, "limit", None) == limit for task in found.tasks) or not names
    assert found.required == bool(set(options) & {"tasks", "capabilities"} and names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "quik"}, "Unknown suite 'quik'. Did you mean 'quick'"),
        ({"tasks": "hellasvag"}, "Unknown task 'hellasvag'. Did you mean 'hellaswag'"),
        ({"tasks": "mine.yaml:math"}, "There is no file 'mine.yaml'"),
        ({"tasks": "README.yaml"}, "There is no file 'README.yaml'"),
        ({"tasks": ["piqa", "piqa"]}, "Task 'piqa' was named twice"),
        ({"tasks": "humaneval"}, "Task humaneval: code that a model has written runs only with allow_code_execution"),
        ({"capabilities": "code"}, "Task humaneval, mbpp: code that a model has written runs only with"),
        ({"tasks": "pocket_code"}, "Task pocket_code: code that a model has written runs only with"),
        ({"capabilities": "none", "suite": "full"}, "measures nothing, but suite was given"),
        ({"capabilities": "code,math", "tasks": "gsm8k"}, "Capabilities code were asked for, but none of the tasks"),
        ({"suite": "pocket", "limit": 5}, "limit is for benchmarks; pocket_general"),
        (
            {"suite": "pocket", "tasks": ["pocket_math", "piqa"]},
            "The suite 'pocket' does not have piqa; leave the suite",
        ),
        ({"suite": "pocket", "task_data": "."}, "task_data is for benchmarks, and none is asked for"),
        ({"limit": 0}, "limit must be at least 1; 0 was given"),
        ({"task_data": "/no/such/folder"}, "There is no folder '/no/such/folder' with the data of tasks"),
    ],
)
def test_what_does_not_exist_or_go_together_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        choose_tasks(CalibPruneConfig("other/model", **options))


def test_a_users_own_file_needs_a_capability_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\n")
    with pytest.raises(ValueError, match=r"Unknown capability of the task '.*a.yaml' 'maths'. Did you mean 'math'"):
        choose_tasks(CalibPruneConfig("other/model", tasks=f"{tmp_path / 'a.yaml'}:maths"))
    assert choose_tasks(CalibPruneConfig("other/model", tasks=str(tmp_path / "a.yaml"))).capabilities == ["general"]


def test_auto_measures_what_it_can_and_names_the_rest(data: Path) -> None:
    (data / "mbpp.jsonl").unlink()
    config = CalibPruneConfig("mine", samples=8, length=64, mix="single:gsm8k", limit=5, task_data=data)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=2048, max_position_embeddings=512))
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    pruner = CalibPruner(model, tokenizer, config, sources=[pocket.sources()["gsm8k"]])
    scores = pruner.evaluate()
    assert [(task.task, len(task.item_scores), task.data) for task in scores.tasks] == [("piqa", 5, "piqa_val.jsonl")]
    assert set(scores.not_measured) == {"general", "code", "math"}
    assert "allow_code_execution=True (--allow-code-execution) (humaneval, mbpp)" in scores.not_measured["code"]
    assert "there is no mmlu.jsonl among the local files (mmlu)" in scores.not_measured["general"]
    assert scores.missing_tasks["hellaswag"] == "there is no hellaswag.jsonl among the local files"
    record = pruner.prune()
    assert record.capabilities.not_measured == {**scores.not_measured, **scores.missing_tasks}
    (piqa,) = record.tasks
    assert (piqa.items, piqa.shots, piqa.data, piqa.chance) == (5, 0, "piqa_val.jsonl", 0.5)
    assert piqa.repo == "", "its items are not known to be those of the Hub"
    assert RunRecord.from_json(record.to_json()) == record
    assert str(data.parent) not in record.to_json()


def test_the_pocket_has_perplexity_beside_benchmarks_and_not_beside_its_own_probes(data: Path) -> None:
    text = json.loads((pocket.MODEL.parent / "texts" / "wikitext2.jsonl").read_text().splitlines()[0])["text"]
    (data / "wikitext2_test.jsonl").write_text(lines([{"text": text}] * 8))
    options = {"suite": "quick", "task_data": data, "mix": "uniform", "samples": 8, "length": 64}
    found = CalibPruner.from_pretrained("pocket", **options).prune().perplexity
    assert found is not None
    assert (found.text, found.length) == ("WikiText-2, wikitext2_test.jsonl", 1024), "windows as long as its context"
    assert found.tokens >= 1024
    assert 1 < found.dense < found.sparse
    assert choose_perplexity_text(CalibPruneConfig("pocket", suite="full"), None) is WIKITEXT2
    for own in ({}, {"tasks": "pocket_math"}, {"capabilities": "none"}):
        assert choose_perplexity_text(CalibPruneConfig("pocket", **own), None) is None


def test_what_is_asked_for_by_name_must_be_there(data: Path) -> None:
    pruner = CalibPruner.from_pretrained("pocket", tasks=["piqa", "sciq"], task_data=data)
    with pytest.raises(
        ValueError, match=r"Task 'sciq' cannot be measured: there is no sciq.jsonl among the local files"
    ):
        pruner.prune()
    assert not pruner._pruned, "nothing was done yet"


def test_scores_of_the_first_records_still_load() -> None:
    old = '{"schema_version": 1, "tasks": [{"task": "t", "capability": "math", "metric": "acc", "chance": 0.0, "item_scores": [1.0]}], "not_measured": {}}'
    assert Scores.from_json(old) == Scores((TaskScore("t", "math", "acc", 0.0, (1.0,)),))
    config = json.loads(CalibPruneConfig("pocket").to_json())
    for name in ("suite", "tasks", "limit", "task_data", "allow_code_execution"):
        del config[name]
    assert CalibPruneConfig.from_json(json.dumps(config)) == CalibPruneConfig("pocket")


def test_the_recorded_command_names_the_tasks_without_folders(data: Path) -> None:
    (data / "own.yaml").write_text("task: own\n")
    given = {"suite": "full", "tasks": ["piqa", f"{data}/own.yaml:math"], "limit": 4, "allow_code_execution": True}
    config = CalibPruneConfig("pocket", task_data=data, **given)
    line = command(config, BaseModel("pocket"), [])
    assert "--suite full --tasks piqa own.yaml:math --limit 4 --task-data data --allow-code-execution" in line
    assert str(data.parent) not in public_config(config, BaseModel("pocket"), []).to_json()


def test_a_task_that_only_the_dense_model_was_asked_is_left_out_and_named() -> None:
    def scores(*tasks: str, missing: dict[str, str]) -> Scores:
        made = [TaskScore(name, "math", "acc", 0.0, (1.0, 1.0, 0.0, 1.0) * 5) for name in tasks]
        return Scores(tuple(made), {}, missing)

    report = report_of_both(
        scores("a", "b", missing={"c": "no data"}), scores("a", missing={"b": "no memory", "c": "no data"})
    )
    assert report.capabilities[0].items == 20
    assert report.not_measured == {"b": "no memory", "c": "no data"}


# -------------------------------------------------------------------------------------------- command line


def test_evaluate_runs_benchmarks_ones_own_tasks_and_code_in_the_sandbox(data: Path) -> None:
    if not isolation().available:
        pytest.skip(f"code cannot be isolated here: {isolation().reason}")
    asked = [
        "--tasks",
        "piqa",
        "mbpp",
        own(data, "general"),
        "--task-data",
        ".",
        "--allow-code-execution",
        "--limit",
        "40",
    ]
    done = run("evaluate", "pocket", *asked, cwd=data)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:5] for line in done.stdout.splitlines()[2:5]]
    assert rows[:2] == [["commonsense", "piqa", "0", "acc", "12"], ["code", "mbpp", "3", "pass@1", "3"]]
    assert rows[2][:4] == ["general", "own_general", "0", "acc"]
    assert "Not measured: math: not asked for" in done.stdout
    assert "Traceback" not in done.stderr


def test_prune_measures_ones_own_tasks_and_its_command_does_it_again(data: Path) -> None:
    asked = ["--tasks", own(data, "general"), own(data, "commonsense"), "--sparsity", "50%", *SMALL]
    first = run("prune", "pocket", *asked, "--output", "a", cwd=data)
    assert first.returncode == 0, first.stderr
    record = RunRecord.from_json((data / "a" / "calibprune.json").read_text())
    assert record.capabilities.measured == ("general", "commonsense")
    assert "total (general, commonsense)" in first.stdout
    words = shlex.split(record.command.replace("--output DIR", "--output b"))
    again = run(*words[2:], cwd=data)
    assert again.returncode == 0, again.stderr
    assert (data / "b" / "scores" / "sparse.json").read_bytes() == (data / "a" / "scores" / "sparse.json").read_bytes()
    assert RunRecord.from_json((data / "b" / "calibprune.json").read_text()).capabilities == record.capabilities


def test_code_is_refused_without_permission_and_a_missing_task_fails_in_a_sentence(data: Path) -> None:
    code = run("evaluate", "pocket", "--tasks", "mbpp", "--task-data", ".", cwd=data)
    assert (code.returncode, code.stdout) == (2, "")
    assert code.stderr.strip().endswith("runs only with allow_code_execution=True (--allow-code-execution).")
    missing = run("evaluate", "pocket", "--tasks", "sciq", "--task-data", ".", cwd=data)
    assert missing.returncode == 1
    assert missing.stderr == "Error: Task 'sciq' cannot be measured: there is no sciq.jsonl among the local files.\n"


def test_a_benchmark_comes_from_the_hub_where_it_can_be_reached(data: Path) -> None:
    with HubServer() as hub:
        hub.add_repo(
            "baber/piqa",
            {"train.jsonl": lines(PIQA[:2]).encode(), "validation.jsonl": lines(PIQA).encode()},
            repo_type="dataset",
        )
        environment = hub.environment(data / "home") | {"HF_HUB_OFFLINE": "0"}
        asked = ["--tasks", "piqa", "--limit", "6", "--json"]
        done = run("evaluate", "pocket", *asked, cwd=data, **environment)
        assert done.returncode == 0, done.stderr
        task = json.loads(done.stdout)["scores"]["tasks"][0]
        assert (task["data"], len(task["item_scores"])) == ("baber/piqa, validation", 6)
        missing = run("evaluate", "pocket", "--tasks", "sciq", cwd=data, **environment)
        assert missing.returncode == 1
        assert "Error: Task 'sciq' cannot be measured: allenai/sciq cannot be had here" in missing.stderr
        some = run("evaluate", "pocket", "--suite", "quick", "--json", cwd=data, **environment)
        assert some.returncode == 0, some.stderr
        scores = Scores.from_dict(json.loads(some.stdout)["scores"])
        assert [task.task for task in scores.tasks] == ["piqa"], "although others before it are not there"
        assert "Rowan/hellaswag cannot be had here" in scores.missing_tasks["hellaswag"]
