# SPDX-License-Identifier: Apache-2.0
"""CalibPruner on the pocket model: what is saved is what was pruned, and bad input is refused early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
)

from optimum_calibprune import CalibPruneConfig, CalibPruner, RunRecord, pocket
from optimum_calibprune.capabilities.retention import capability_report, task_retentions
from optimum_calibprune.cli_text import plan_text
from optimum_calibprune.records import Scores, TaskScore


SMALL = {"samples": 16, "mix": "uniform", "capabilities": "none"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CalibPruner, Path]]:
    pruner = CalibPruner.from_pretrained("pocket", sparsity="50%", mix="igsp", capabilities="general,math")
    pruner.prune()
    folder = tmp_path_factory.mktemp("runs") / "pocket-50"
    pruner.save_pretrained(folder)
    yield pruner, folder


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(64).view(2, 32)).logits


def test_plain_transformers_loads_the_checkpoint_with_equal_logits(saved: tuple[CalibPruner, Path]) -> None:
    pruner, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(_logits(loaded), _logits(pruner.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("def f(x):")["input_ids"] == pruner.tokenizer("def f(x):")["input_ids"]


def test_the_config_of_the_base_is_unchanged(saved: tuple[CalibPruner, Path]) -> None:
    base, pruned = (AutoConfig.from_pretrained(p).to_dict() for p in (pocket.MODEL, saved[1]))
    for config in (base, pruned):
        config.pop("_name_or_path", None)
    assert pruned == base
    assert "sparsity" not in (saved[1] / "config.json").read_text()


def test_every_listed_module_has_the_zeros_that_were_asked_and_nothing_else_changed(
    saved: tuple[CalibPruner, Path],
) -> None:
    pruner, folder = saved
    before, after = load_file(pocket.MODEL / "model.safetensors"), load_file(folder / "model.safetensors")
    record = pruner.record
    assert record is not None
    assert len(record.prune.layers) == 42
    for layer in record.prune.layers:
        weight = after.pop(f"{layer.module}.weight")
        before.pop(f"{layer.module}.weight")
        assert int((weight == 0).sum()) == layer.zeros_found == layer.zeros_asked == weight.numel() // 2
        assert not bool(torch.signbit(weight[weight == 0]).any()), "minus zero"
        assert layer.rescue == ""
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_run_folder_holds_the_record_the_ids_and_every_item(saved: tuple[CalibPruner, Path]) -> None:
    pruner, folder = saved
    assert RunRecord.from_json((folder / "calibprune.json").read_text()) == pruner.record
    ids = load_file(folder / "calibration.safetensors")["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.shape == (64, 256)
    assert np.array_equal(ids.numpy(), pruner.calibration.input_ids)
    for name in ("dense", "sparse"):
        scores = Scores.from_json((folder / "scores" / f"{name}.json").read_text())
        assert {t.task: len(t.item_scores) for t in scores.tasks} == {"pocket_general": 400, "pocket_math": 400}
        assert scores == pruner.scores[name]
    assert str(folder.parent) not in (folder / "calibprune.json").read_text()


def test_the_card_reports_the_measured_retention(saved: tuple[CalibPruner, Path]) -> None:
    pruner, folder = saved
    card = (folder / "README.md").read_text()
    report = pruner.record.capabilities
    assert [c.capability for c in report.capabilities] == ["general", "math"]
    for entry in report.capabilities:
        assert f"{100 * entry.retention:.1f}\u00a0%" in card
        assert 0.0 <= entry.retention < 1.0
    assert f"{100 * report.total:.1f}\u00a0%" in card
    assert "total** (general, math)" in card
    shown = [line.rpartition("(")[2].rstrip(")") for line in card.splitlines() if line.startswith("![")]
    assert shown == ["figures/retention-light.png", "figures/tasks-light.png"]
    assert len([path for path in (folder / "figures").iterdir() if path.stat().st_size > 5000]) == 8


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pruner = CalibPruner.from_pretrained("pocket", seed=seed, **SMALL)
        pruner.prune()
        pruner.save_pretrained(tmp_path / name)
        files[name] = [(tmp_path / name / f).read_bytes() for f in ("model.safetensors", "calibration.safetensors")]
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]
    assert files["a"][1] != files["c"][1]


def test_igsp_keeps_its_quotas_and_its_trace(saved: tuple[CalibPruner, Path]) -> None:
    mix = saved[0].record.mix
    groups = [row.group for row in saved[0].record.rows]
    assert {g: groups.count(g) for g in set(groups)} == {"general": 11, "commonsense": 11, "code": 21, "math": 21}
    after_greedy = list(mix.trace[63:])  # J after the last greedy step, then after each swap and each better round
    assert after_greedy == sorted(after_greedy, reverse=True)
    assert mix.objective == mix.trace[-1]
    assert mix.objective == pytest.approx(mix.parts["aggregation"] + mix.parts["lambda"] * mix.parts["level"])


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_other_methods_run_through(method: str) -> None:
    pruner = CalibPruner.from_pretrained("pocket", sparsity="2:4", method=method, **SMALL)
    record = pruner.prune()
    assert record.prune.zeros == record.prune.weights // 2
    assert record.prune.method == method


def test_n_m_holds_in_every_row() -> None:
    pruner = CalibPruner.from_pretrained("pocket", sparsity="2:4", **SMALL)
    pruner.prune()
    weight = pruner.model.model.layers[3].mlp.down_proj.weight
    assert bool(((weight.view(192, -1, 4) == 0).sum(dim=2) == 2).all())


def test_sources_may_be_in_memory() -> None:
    text = ["The quick brown fox jumps over the lazy dog. " * 40] * 40
    ids = np.arange(64 * 64).reshape(64, 64) % 2048
    pruner = CalibPruner.from_pretrained(
        "pocket",
        sources={"notes:general": text, "numbers:math": ids},
        **(SMALL | {"length": 64, "samples": 8}),
    )
    record = pruner.prune()
    assert record.mix.shares == {"notes": 0.5, "numbers": 0.5}
    assert [s.name for s in record.sources] == ["notes", "numbers"]
    assert RunRecord.from_json(record.to_json()) == record


def test_a_model_of_ones_own_can_be_pruned_and_says_what_was_not_measured() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=2048,
        max_position_embeddings=64,
    )
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    source = pocket.sources()["gsm8k"]
    pruner = CalibPruner(
        LlamaForCausalLM(config), tokenizer, CalibPruneConfig("mine", samples=8, mix="single:gsm8k"), sources=[source]
    )
    assert pruner.config.length == 64, "the length is no longer than the context"
    record = pruner.prune()
    assert set(record.capabilities.not_measured) == {"general", "commonsense", "code", "math"}
    assert record.perplexity.dense is None
    assert "HF_HUB_OFFLINE" in record.perplexity.reason


def test_perplexity_is_measured_on_a_local_text(tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    lines = Path(str(pocket.sources()["gsm8k"].path)).read_text().splitlines()
    text.write_text("\n\n".join(json.loads(line)["text"] for line in lines)[:60_000])
    pruner = CalibPruner.from_pretrained("pocket", perplexity_text=text, **SMALL)
    record = pruner.prune()
    assert 5 < record.perplexity.dense < record.perplexity.sparse < 50
    assert record.perplexity.text == "held_out"


def test_the_plan_tells_what_will_happen() -> None:
    pruner = CalibPruner.from_pretrained("pocket", sparsity="60%")
    plan = pruner.plan()
    assert (plan.blocks, plan.modules, plan.weights) == (6, 42, 2_654_208)
    assert [(e.name, e.reason) for e in plan.untouched] == [
        ("model.embed_tokens.weight", "embeddings, which are never pruned")
    ]
    assert plan.replays == 0
    assert str(plan.mix) == "igsp"
    assert plan.written == 4 * 64 * 256
    assert 0 < plan.seconds < 600
    assert all(size > 0 for size in plan.memory.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ["gsm9k"]}, "Unknown source 'gsm9k'. Did you mean 'gsm8k'"),
        ({"sources": ["no/such/file.jsonl"]}, "no file or folder"),
        ({"mix": "single:piqua"}, "Unknown source 'piqua'. Did you mean 'piqa'"),
        ({"mix": "single:c4", "sources": ["piqa"]}, "Unknown source of the mix 'c4'"),
        ({"mix": "igps"}, "Unknown mix 'igps'. Did you mean 'igsp'"),
        ({"sparsity": "100%"}, "between 0 and 1"),
        ({"sparsity": "3:5"}, r"model.layers.0.self_attn.q_proj has 192 columns, which m = 5"),
        ({"capabilities": "coding"}, "Unknown capability 'coding'"),
        ({"length": 4096}, "exceeds the model's context of 1024"),
        ({"dtype": "int8"}, "Unknown dtype"),
        ({"device": "gpu0"}, "Unknown device"),
        ({"perplexity_text": "none.txt"}, "no file 'none.txt'"),
    ],
)
def test_bad_input_is_refused_before_any_work(options: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CalibPruner.from_pretrained("pocket", **options)


def test_too_little_text_says_how_much_there_was() -> None:
    pruner = CalibPruner.from_pretrained("pocket", sources={"tiny:math": ["1 + 1 = 2"]}, capabilities="none")
    with pytest.raises(
        ValueError, match=r"too short: 64 samples of 256 tokens .* its 1 documents give 0 \(\d+ tokens\)"
    ):
        pruner.prune()


def test_ids_outside_the_vocabulary_are_refused() -> None:
    pruner = CalibPruner.from_pretrained(
        "pocket", sources={"ids:math": np.full((16, 64), 2048)}, length=64, samples=4, capabilities="none"
    )
    with pytest.raises(ValueError, match="token id 2048; the model's vocabulary has ids 0 to 2047"):
        pruner.prune()


def test_a_failure_before_pruning_leaves_the_model_usable() -> None:
    pruner = CalibPruner.from_pretrained("pocket", sources={"tiny:math": ["1 + 1 = 2"]}, capabilities="none")
    with pytest.raises(ValueError, match="too short"):
        pruner.prune()
    assert pruner.evaluate().not_measured
    with pytest.raises(ValueError, match=r"call prune\(\) first"):
        pruner.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("error", [Exception("No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Rust libraries below tell of it: not as an OSError."""

    def fail(*_: object, **__: object) -> None:
        raise error

    pruner = CalibPruner.from_pretrained("pocket", **SMALL)
    pruner.prune()
    monkeypatch.setattr(pruner.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="could not be written: No space left"):
        pruner.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_is_pruned_once() -> None:
    pruner = CalibPruner.from_pretrained("pocket", **SMALL)
    pruner.prune()
    with pytest.raises(ValueError, match="pruned already"):
        pruner.prune()


def test_an_unknown_model_is_named_with_a_way_out() -> None:
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE is set\. Did you mean 'pocket'"):
        CalibPruner.from_pretrained("pockte")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ["c5"]}, "Did you mean 'c4'"),
        ({"capabilities": "code"}, "runs only with allow_code_execution=True"),
        ({"tasks": "hellasvag"}, "Unknown task .hellasvag.. Did you mean .hellaswag."),
    ],
)
def test_bad_options_are_refused_before_a_model_is_looked_for(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibPruner.from_pretrained("no-such/model", **options)


def test_a_saved_run_is_measured_like_its_base_and_a_folder_named_pocket_is_not(
    saved: tuple[CalibPruner, Path], tmp_path: Path
) -> None:
    again = CalibPruner.from_pretrained(str(saved[1]), capabilities="general")
    assert again.base.name == "pocket-50"
    assert again.is_pocket
    assert again.evaluate().tasks[0] == saved[0].scores["sparse"].tasks[0]
    (tmp_path / "pocket").symlink_to(pocket.MODEL)
    assert not CalibPruner.from_pretrained(str(tmp_path / "pocket")).is_pocket


@pytest.mark.parametrize("given", ["gsm8k", Path(str(pocket.sources()["gsm8k"].path)), pocket.sources()["gsm8k"]])
def test_one_source_need_not_be_a_list(given: object) -> None:
    assert CalibPruner.from_pretrained("pocket", sources=given, capabilities="none").plan().sources == ("gsm8k",)


def test_dense_scores_of_other_tasks_are_refused_before_any_work() -> None:
    pruner = CalibPruner.from_pretrained("pocket", capabilities="math")
    with pytest.raises(ValueError, match="dense_scores are of no task; this run measures pocket_math"):
        pruner.prune(dense_scores=Scores(()))


def test_metrics_score_the_texts_of_a_task_before_and_after() -> None:
    seen: list[tuple[str, str]] = []

    def ends_alike(predictions: list[str], references: list[str]) -> dict[str, float]:
        seen.append((predictions[0], references[0]))
        return {"ends_alike": float(predictions[0].strip().endswith(references[0]))}

    options = {"capabilities": "math", "mix": "uniform", "samples": 8, "length": 64}
    pruner = CalibPruner.from_pretrained("pocket", metrics={"pocket_math": ends_alike}, **options)
    record = pruner.prune()
    assert len(seen) == 800
    assert all(text and "####" not in reference for text, reference in seen)
    for state in ("dense", "sparse"):
        (task,) = pruner.scores[state].tasks
        assert task.metric == "ends_alike"
    assert pruner.scores["dense"].tasks[0].value > 0.7
    assert record.capabilities.measured == ("math",)
    own = CalibPruner.from_pretrained("pocket", **options).evaluate()
    assert own.tasks[0].metric == "exact_match", "the other scores were not kept"
    other = CalibPruner.from_pretrained("pocket", metrics={"pocket_math": ends_alike}, **options)
    with pytest.raises(ValueError, match=r"dense_scores of task 'pocket_math' .* scored differently"):
        other.prune(dense_scores=own)

    def exact_match(predictions: list[str], references: list[str]) -> float:
        return 1.0

    other = CalibPruner.from_pretrained("pocket", metrics={"pocket_math": exact_match}, **options)
    with pytest.raises(ValueError, match=r"dense_scores of task 'pocket_math' .* scored differently"):
        other.prune(dense_scores=own)  # lm-eval's metric of that name
    other.prune(dense_scores=other.evaluate())


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("gsm8k", len, "A metric is given for 'gsm8k'; this run measures pocket_general, pocket_math"),
        (
            "pocket_general",
            len,
            "'pocket_general' cannot be measured: a metric scores texts, and of this task choices are",
        ),
        ("pocket_math", len, r"'pocket_math' cannot be measured: its metric 'len' fails: len\(\) takes exactly one"),
        (
            "pocket_math",
            lambda *_: 2,
            "its metric '<lambda>' fails: The metric returns 2 for one item; a score is a number",
        ),
    ],
)
def test_a_metric_that_does_not_do_is_a_sentence(task: str, metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibPruner.from_pretrained(
            "pocket", metrics={task: metric}, tasks=["pocket_general", "pocket_math"]
        ).evaluate()


def test_dense_scores_of_other_items_are_refused_before_any_work() -> None:
    pruner = CalibPruner.from_pretrained("pocket", capabilities="math")
    (task,) = pruner._measuring.tasks.tasks
    same = TaskScore("pocket_math", "math", "exact_match", 0.0, (1.0,) * 400, task.fingerprint())
    pruner._measuring.check_scores(Scores((same,)))
    pruner._measuring.check_scores(Scores((replace(same, fingerprint=""),)))
    for other in (replace(same, fingerprint="ab" * 32), replace(same, fingerprint="", item_scores=(1.0,) * 399)):
        with pytest.raises(ValueError, match="dense_scores of task 'pocket_math' are of other items than this run's"):
            pruner.prune(dense_scores=Scores((other,)))
    assert not pruner._pruned


def test_a_model_that_cannot_be_pruned_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    Llama4TextConfig(num_hidden_layers=2, num_local_experts=4, hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.experts\.gate_up_proj holds several matrices"):
        CalibPruner.from_pretrained(str(tmp_path), capabilities="none")
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 't5', which transformers has no causal language model for"):
        CalibPruner.from_pretrained(str(tmp_path), capabilities="none")


def test_a_mixture_of_experts_is_planned_pruned_reported_and_saved(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config)
    model.model.layers[0].mlp.gate.weight.data[2] = 0.0  # equal to the last but one in every token
    model.model.layers[0].mlp.gate.weight.data[3] = 0.0
    asked = CalibPruneConfig("mixture", samples=8, length=32, mix="uniform", capabilities="none", sequential="block")
    texts = [f"Note {i}: {i} plus {i} is {2 * i}, as everyone knows." for i in range(200)]
    pruner = CalibPruner(model, tokenizer, asked, sources={"notes:general": texts})
    plan = pruner.plan()
    assert (plan.modules, plan.experts) == (2 * (4 + 4 * 3), 8)
    assert plan.weights == 2 * (32 * (32 + 16 + 16 + 32) + 4 * 3 * 32 * 48)
    assert plan.memory["inputs of the experts on cpu"] == 8 * 32 * 32 * 4
    assert "32 linear layers, with those of 8 experts, in 2 blocks" in plan_text(plan)
    record = pruner.prune()
    assert len(record.prune.layers) == plan.modules
    assert (record.prune.weights, record.prune.zeros) == (plan.weights, plan.weights // 2)
    assert len(record.prune.experts) == 8
    assert record.prune.experts["model.layers.0.mlp.experts.3"], "ties go to the first"
    pruner.save_pretrained(tmp_path / "sparse")
    assert RunRecord.from_json((tmp_path / "sparse" / "calibprune.json").read_text()) == record
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "of 8 experts were sent too few tokens for one of their matrices" in card
    assert "| `model.layers.1.mlp.experts.*.down_proj`, 4 experts | 32 x 48 | 3072 | 3072 |" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(_logits(loaded), _logits(pruner.model))
    weights = load_file(tmp_path / "sparse" / "model.safetensors")
    zeros = {layer.module: layer.zeros_found for layer in record.prune.layers}
    assert int((weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == 0).sum()) == 32 * 48 // 2
    assert zeros["model.layers.1.mlp.experts.3.down_proj"] == 32 * 48 // 2


def test_a_mix_may_name_any_source_of_the_table() -> None:
    plan = CalibPruner.from_pretrained("pocket", mix="weighted:pocket_math=3,gsm8k=1", capabilities="none").plan()
    assert plan.sources == ("gsm8k", "pocket_math")


def test_a_quantised_base_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = json.loads((pocket.MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised already \(fp8\).*dequantize=True"):
        CalibPruner.from_pretrained(str(tmp_path))


def test_a_task_is_recorded_with_how_it_was_measured_and_what_it_kept() -> None:
    dense = TaskScore("t", "math", "acc", 0.25, (1.0, 1.0, 0.0, 1.0) * 20, "f", 5, "some/set, test")
    sparse = replace(dense, item_scores=(1.0, 0.0, 0.0, 1.0) * 20)
    only_dense = replace(dense, task="other")
    (found,) = task_retentions(Scores((dense, only_dense)), Scores((sparse,)), {"t": "some/set"})
    assert (found.shots, found.data, found.chance, found.repo) == (5, "some/set, test", 0.25, "some/set")
    (entry,) = capability_report(Scores((dense,)), Scores((sparse,))).capabilities
    assert (found.items, found.dense, found.sparse) == (80, 0.75, 0.5)
    assert (found.retention, found.interval) == (entry.retention, entry.interval)
    assert found.retention == pytest.approx(2 / 3)
