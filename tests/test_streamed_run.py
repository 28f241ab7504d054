# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on a model that stays on disk, stopped and resumed, in Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_calibprune import CalibPruner, loading, pocket
from optimum_calibprune.calibration import measure
from optimum_calibprune.capabilities import score, store
from optimum_calibprune.cli_text import plan_text
from optimum_calibprune.pruning.homes import Streamed
from optimum_calibprune.pruning.schedule import Cancelled


TEXT: list[Path] = []
CONSTANT = """
import datasets
import evaluate

class Constant(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{name: datasets.Value("string") for name in ("predictions", "references")}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"constant": {}}}
"""


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one to measure perplexity on."""
    lines = (pocket.MODEL.parent / "texts" / "wikitext2.jsonl").read_text(encoding="utf-8").splitlines()
    TEXT.append(tmp_path_factory.mktemp("text") / "short.jsonl")
    TEXT[0].write_text("\n".join(lines[:3]), encoding="utf-8")
    return TEXT[0]


def opened(stream: bool | str = True, **options: Any) -> CalibPruner:
    config = {"mix": "uniform", "samples": 8, "length": 64, "micro_batch": 2, "capabilities": "none", **options}
    return CalibPruner.from_pretrained("pocket", stream=stream, **{"perplexity_text": TEXT[0], **config})


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> CalibPruner:
    pruner = opened(stream=False)
    pruner.prune()
    pruner.save_pretrained(tmp_path_factory.mktemp("saved") / "run")
    return pruner


@pytest.mark.parametrize("options", [{}, {"allocation": "owl"}, {"sparsity": "2:4", "sequential": "block"}])
def test_a_streamed_run_saves_what_a_run_in_memory_saves(options: dict[str, Any], tmp_path: Path) -> None:
    expected = opened(stream=False, **options)
    record = expected.prune()
    expected.save_pretrained(tmp_path / "memory")
    pruner = opened(**options)
    assert pruner.streamed
    streamed = pruner.prune(work_dir=tmp_path / "work")
    pruner.save_pretrained(tmp_path / "streamed")
    one, other = tensors_in(tmp_path / "memory"), tensors_in(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert streamed.perplexity == record.perplexity
    assert streamed.profiles == record.profiles
    assert [layer.zeros_found for layer in streamed.prune.layers] == [x.zeros_found for x in record.prune.layers]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected.model(ids).logits)
        assert torch.equal(loaded(ids).logits, pruner.model(ids).logits)


@pytest.mark.parametrize("stream", [True, False])
def test_a_run_that_was_stopped_goes_on_and_keeps_what_was_measured(
    stream: bool, in_memory: CalibPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with pytest.raises(Cancelled):
        opened(stream).prune(
            work_dir=tmp_path / "work",
            on_progress=lambda done, total, text: seen.append(text),
            cancelled=lambda: any("layers.3." in text for text in seen),
        )
    assert json.loads((tmp_path / "work" / "manifest.json").read_text())["done"] == 3
    pruner = opened(stream)
    monkeypatch.setattr(pruner, "choose_calibration", lambda **_: pytest.fail("it was chosen before"))
    record = pruner.prune(work_dir=tmp_path / "work", resume=True)
    assert in_memory.record is not None
    assert record.perplexity == in_memory.record.perplexity
    assert record.fingerprint == in_memory.record.fingerprint
    assert record.seconds["before it was resumed"] > 0
    expected = in_memory.model.state_dict()
    assert all(
        torch.equal(expected[key], value) for key, value in pruner.model.state_dict().items() if not value.is_meta
    )
    pruner.save_pretrained(tmp_path / "saved")
    saved = tensors_in(tmp_path / "saved")
    assert all(torch.equal(expected[key], value) for key, value in saved.items())


def test_scores_of_a_streamed_model_are_kept_by_task_apart_for_dense_and_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(store, "place", lambda key: tmp_path / "kept" / f"{key}.json")
    asked: list[int] = []
    ask = score.ask
    monkeypatch.setattr(score, "ask", lambda engine, requests: asked.append(1) or ask(engine, requests))
    first = opened(capabilities="commonsense").evaluate()
    pruner = opened(capabilities="commonsense")
    assert pruner.evaluate() == first
    assert len(asked) == 1
    pruner.prune(work_dir=tmp_path / "work")
    assert pruner.scores["dense"] == first
    assert pruner.scores["sparse"] != first
    assert pruner.evaluate() == pruner.scores["sparse"]
    assert len(asked) == len(list((tmp_path / "kept").iterdir())) == 2


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        opened().prune(work_dir=tmp_path / "work", cancelled=lambda: True)
    with pytest.raises(ValueError, match=r'config\.sparsity was "50%" and is "60%"'):
        opened(sparsity="60%").prune(work_dir=tmp_path / "work", resume=True)


def test_another_metric_does_not_go_on(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise Cancelled

    options = {"stream": False, "capabilities": "math"}
    with pytest.raises(Cancelled):
        opened(metrics={"pocket_math": max}, **options).prune(work_dir=tmp_path / "work", on_progress=stop)
    for metrics, now in (({"pocket_math": min}, '"min"'), ({}, "null")):
        pruner = opened(metrics=metrics, **options)
        with pytest.raises(ValueError, match=f'metrics.pocket_math was "max" and is {now}'):
            pruner.prune(work_dir=tmp_path / "work", resume=True)


def constant(value: float) -> Callable[..., float]:
    def metric(predictions: list[str], references: list[str]) -> float:
        return value

    return metric


def constant_of_files(value: float, folder: Path) -> evaluate.EvaluationModule:
    """The same as a metric of `evaluate`, whose name does not tell its value."""
    (folder / "constant").mkdir(parents=True, exist_ok=True)
    (folder / "constant" / "constant.py").write_text(CONSTANT.format(value), encoding="utf-8")
    return evaluate.load(str(folder / "constant"))


def stopped_after_its_dense_scores(metric: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a run that has measured the dense model by a metric, and was stopped then. Nothing is asked: these
    metrics do not look at the answers."""
    monkeypatch.setattr(score, "ask", lambda engine, requests: [""] * len(requests))

    def stop(done: int, total: int, stage: str) -> None:
        if stage.startswith("prune"):
            raise Cancelled

    options = {"stream": False, "capabilities": "math"}
    with pytest.raises(Cancelled):
        opened(metrics={"pocket_math": metric}, **options).prune(work_dir=folder, on_progress=stop)
    return options


def test_a_metric_of_the_same_name_from_other_files_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarter, half = (constant_of_files(value, tmp_path / str(value)) for value in (0.25, 0.5))
    options = stopped_after_its_dense_scores(quarter, tmp_path / "work", monkeypatch)
    with pytest.raises(ValueError, match=r"metric_fingerprints\.pocket_math was "):
        opened(metrics={"pocket_math": half}, **options).prune(work_dir=tmp_path / "work", resume=True)
    pruner = opened(metrics={"pocket_math": quarter}, **options)
    scores, measured = pruner._measuring.scores, []
    pruner._measuring.scores = lambda shown: measured.append(1) or scores(shown)
    pruner.prune(work_dir=tmp_path / "work", resume=True)
    assert measured == [1], "the scores of the dense model were there"
    assert [pruner.scores[state].tasks[0].value for state in ("dense", "sparse")] == [0.25, 0.25]


def test_scores_by_a_function_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = stopped_after_its_dense_scores(constant(0.25), tmp_path / "work", monkeypatch)
    pruner = opened(metrics={"pocket_math": constant(0.5)}, **options)
    pruner.prune(work_dir=tmp_path / "work", resume=True)
    assert [pruner.scores[state].tasks[0].value for state in ("dense", "sparse")] == [0.5, 0.5]


def test_another_text_for_perplexity_does_not_go_on(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(Cancelled):
        opened().prune(
            work_dir=tmp_path / "work", on_progress=lambda *step: seen.append(step[2]), cancelled=lambda: True
        )
    TEXT[0].write_text(TEXT[0].read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(ValueError, match="perplexity text was"):
        opened().prune(work_dir=tmp_path / "work", resume=True)


def test_what_was_measured_of_the_pruned_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(stream=False)
    first.prune(work_dir=tmp_path / "work")
    again = opened(stream=False)
    monkeypatch.setattr(again._measuring, "perplexity", lambda *_: pytest.fail("it was measured before"))
    record = again.prune(work_dir=tmp_path / "work", resume=True)
    assert first.record is not None
    assert record.perplexity == first.record.perplexity


def test_capabilities_of_a_streamed_model_are_measured_only_where_asked_for() -> None:
    pruner = opened(capabilities="auto")
    assert pruner.plan().capabilities == ()
    assert all("would be read from disk for every batch" in why for why in pruner.evaluate().not_measured.values())
    assert opened(capabilities="math").plan().capabilities == ("math",)


def command(*words: str | Path) -> tuple[int, str]:
    options = ["--mix", "uniform", "--samples", "8", "--length", "64", "--micro-batch", "2", "--capabilities", "none"]
    script = Path(sys.executable).parent / "optimum-cli"
    asked = [script, "calibprune", "prune", "pocket", *options, *words]
    done = subprocess.run(list(map(str, asked)), capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


def test_a_work_folder_around_the_output_is_refused(tmp_path: Path) -> None:
    code, said = command("--output", tmp_path / "work" / "out", "--work-dir", tmp_path / "work")
    assert (code, said.count("must be apart")) == (2, 1)
    assert not (tmp_path / "work").exists()


def test_the_command_goes_on_as_it_began_on_a_disk_that_holds_the_shards(
    in_memory: CalibPruner, tmp_path: Path
) -> None:
    """`--stream auto` would load the model into memory; what is finished is linked and needs no room."""
    with pytest.raises(Cancelled):
        seen: list[str] = []
        opened(perplexity_text=None).prune(
            work_dir=tmp_path / "out.work",
            on_progress=lambda *step: seen.append(step[2]),
            cancelled=lambda: any("layers.3." in text for text in seen),
        )
    code, said = command("--output", tmp_path / "out", "--resume")
    assert code == 0, said
    expected = in_memory.model.state_dict()
    saved = tensors_in(tmp_path / "out")
    assert all(torch.equal(expected[key], value) for key, value in saved.items())
    assert len(list((tmp_path / "out").glob("model-*"))) == 7
    assert not (tmp_path / "out.work").exists()


def test_what_a_streamed_run_needs_is_said_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="a folder is needed that keeps the finished blocks; give it as work_dir"):
        opened().prune()
    with pytest.raises(ValueError, match=r"would be read from disk once a token\. Name sources"):
        opened(mix="igsp")
    with pytest.raises(ValueError, match="Unknown value 'sometimes' of stream; allowed: 'auto', True, False"):
        opened("sometimes")


def test_a_model_is_streamed_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = opened(stream=False).model
    size = dense.num_parameters() * dense.dtype.itemsize
    monkeypatch.setattr(loading, "free_memory", lambda: 2 * size)
    assert not opened("auto").streamed
    monkeypatch.setattr(loading, "free_memory", lambda: size)
    pruner = opened("auto")
    assert pruner.streamed
    plan = pruner.plan()
    assert plan.streamed
    assert "weights        on disk, read block by block" in plan_text(plan)
    assert "MiB blocks on cpu" in plan_text(plan)


def test_hidden_states_that_do_not_fit_go_to_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from optimum_calibprune.pruning import schedule

    pruner = opened()
    monkeypatch.setattr(schedule, "free_memory", lambda: 1000)
    plan = pruner.plan()
    assert (plan.activations, plan.resident) == ("file", 0)
    assert "hidden states in a file" in plan_text(plan)
    record = pruner.prune(work_dir=tmp_path / "work")
    assert record.plan.activations == "file"


def test_a_block_is_read_once_for_many_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not once for each batch of logits."""
    monkeypatch.setattr(measure, "LOGIT_BYTES", 1)  # one sample a batch
    pruner, reads = opened(), []
    load = Streamed._load
    monkeypatch.setattr(Streamed, "_load", lambda self, part, device: (reads.append(part), load(self, part, device)))
    pruner.prune(work_dir=tmp_path / "work")
    # the likelihood of the samples, the perplexity before, the walk, which begins with one block, and the perplexity after
    assert reads.count(3) == 4
    assert reads.count(0) == 5
