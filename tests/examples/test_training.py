# SPDX-License-Identifier: Apache-2.0
"""From texts to a trained model that the package prunes, on a corpus and a model as small as they can be."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import prepare
import probes
import pytest
import score
import torch
import train
from training import corpus as corpora
from training.batches import Batches
from training.schedule import LAST, STABLE_UNTIL, Budget, learning_rate
from training.shape import PRESETS, Shape, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_calibprune import CalibPruner
from optimum_calibprune.pruning.blocks import find_blocks


EXAMPLES = Path(__file__).parents[2] / "examples" / "pocket"
NOTES = [
    f"Note {i}: the {word} fell into the deep blue lake.\u2028Nobody saw it, " * 4
    for i, word in enumerate("abcdefgh" * 3)
]
TINY = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --mlp 96 --length 32 --batch 8 --warmup 3 --log-every 1 --device cpu"


def _corpus(folder: Path, *options: str) -> Path:
    texts = folder / "texts"
    texts.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*NOTES, "  "])
    for name in ("wikitext2.jsonl", "gsm8k.jsonl"):
        (texts / name).write_text(lines, encoding="utf-8")
    (folder / "books.jsonl").write_text(lines, encoding="utf-8")
    given = ["--calibration", str(texts), "--books", str(folder / "books.jsonl"), "--documents", "150"]
    prepare.main([*given, "--vocabulary", "400", "--output", str(folder / "corpus"), *options])
    return folder / "corpus"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    _train(corpus, folder)
    return folder


def _train(corpus: Path, output: Path, steps: int = 20, options: str = "") -> None:
    given = ["--corpus", str(corpus), "--output", str(output), "--tokens", str(steps * 8 * 32)]
    train.main([*given, *TINY.split(), *options.split()])


# -------------------------------------------------------------------------------------- the corpus


def test_the_corpus_holds_every_source_in_full(corpus: Path) -> None:
    loaded = corpora.load(corpus)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert set(loaded.shares) == {"wikitext2", "gsm8k", "books", "general", "commonsense", "code", "math"}
    assert loaded.shares["math"] == 18 and isinstance(loaded.train.tokens, np.memmap)
    assert loaded.vocabulary == len(tokenizer) == 400
    documents = {}
    for part, split in {"train": loaded.train, "held_out": loaded.held_out}.items():
        first, end = split.spans["gsm8k"]
        documents[part] = tokenizer.decode(split.tokens[first:end].tolist()).split("<|end|>")
        assert documents[part].pop() == ""
    assert (len(documents["train"]), len(documents["held_out"])) == (22, 2)
    assert sorted(documents["train"] + documents["held_out"]) == sorted(NOTES)


def test_the_tokenizer_splits_digits_and_names_its_end(corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert len(tokenizer("2024")["input_ids"]) == 4
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|end|>"
    assert tokenizer.eos_token_id == 0


def test_the_same_texts_make_the_same_corpus(corpus: Path, tmp_path: Path) -> None:
    again = _corpus(tmp_path / "again")
    for file in ("train.npy", "held_out.npy", "corpus.json", "tokenizer/tokenizer.json"):
        assert (corpus / file).read_bytes() == (again / file).read_bytes()
    assert (corpus / "train.npy").read_bytes() != (
        _corpus(tmp_path / "other", "--seed", "2") / "train.npy"
    ).read_bytes()


def test_windows_follow_the_shares_and_never_leave_their_source(corpus: Path) -> None:
    loaded = corpora.load(corpus)
    starts = loaded.train.starts(loaded.shares, 20_000, 33, np.random.default_rng(0))
    total = sum(loaded.shares.values())
    inside = 0
    for name, (first, end) in loaded.train.spans.items():
        own = (starts >= first) & (starts <= end - 33)
        inside += own.sum()
        assert own.mean() == pytest.approx(loaded.shares[name] / total, abs=0.02)
        assert starts[own].min() < first + 100 and starts[own].max() > end - 133
    assert inside == 20_000


def test_batches_depend_on_seed_and_step_alone(corpus: Path) -> None:
    loaded, cpu = corpora.load(corpus), torch.device("cpu")
    batch = Batches(loaded, 32, 0, cpu).draw(7, 8)
    assert batch.shape == (8, 33) and batch.dtype == torch.int64
    assert torch.equal(batch, Batches(loaded, 32, 0, cpu).draw(7, 8))
    assert not torch.equal(batch, Batches(loaded, 32, 0, cpu).draw(8, 8))
    assert not torch.equal(batch, Batches(loaded, 32, 1, cpu).draw(7, 8))


@pytest.mark.parametrize(
    "files, sentence",
    [
        ({}, "has no *.jsonl file"),
        ({"piqa.jsonl": '{"txt": "a"}\n'}, 'piqa.jsonl, line 1: every line must be an object such as {"text": "..."}'),
        ({"piqa.jsonl": '{"text": "a"}\n'}, "has 1 texts; a source needs at least two"),
        ({"code.jsonl": '{"text": "a"}\n{"text": "b"}\n'}, "code.jsonl has the name of a source of generated tasks"),
        ({"mine.jsonl": '{"text": "a"}\n{"text": "b"}\n'}, "gives 'mine' no share"),
    ],
)
def test_bad_texts_are_refused_with_a_sentence(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        prepare.main(["--calibration", str(tmp_path), "--output", str(tmp_path / "out")])


# -------------------------------------------------------------------------------------- training


def test_the_loss_falls_and_speed_is_logged(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="train"):
        _train(corpus, tmp_path / "m", steps=20)
    losses = [float(found[1]) for found in re.finditer(r"loss ([\d.]+), \d+ tokens/s", caplog.text)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(np.log(400), abs=0.4), "a fresh model knows nothing"
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert len(re.findall(r"held out: \w+ [\d.]+", caplog.text)) == 7


def test_micro_batches_see_the_same_batch(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = []
    for size in (8, 2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="train"):
            _train(corpus, tmp_path / str(size), steps=2, options=f"--micro-batch {size}")
        losses.append([float(found) for found in re.findall(r"loss ([\d.]+),", caplog.text)])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(batches: Batches, step: int, count: int) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return draw(batches, step, count)

    draw = Batches.draw
    monkeypatch.setattr(Batches, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "m", options="--save-every 5")
    monkeypatch.setattr(Batches, "draw", draw)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["training.pt"]
    with pytest.raises(SystemExit, match="was written with seed 0, this run has 1; give the same options"):
        _train(corpus, tmp_path / "m", options="--save-every 5 --seed 1")
    with caplog.at_level(logging.INFO, logger="train"):
        _train(corpus, tmp_path / "m", options="--save-every 5")
    assert "going on at step 10" in caplog.text
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(path.name for path in trained.iterdir())
    for path in trained.iterdir():
        assert path.read_bytes() == (tmp_path / "m" / path.name).read_bytes(), path.name


def test_time_ends_a_run_too(corpus: Path, tmp_path: Path) -> None:
    given = ["--corpus", str(corpus), "--output", str(tmp_path / "m"), "--minutes", "0.01"]
    train.main([*given, *TINY.split()])
    assert (tmp_path / "m" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--hidden 60 --heads 8", "each head must get an even number of columns"),
        ("--heads 4 --kv-heads 3", "4 heads cannot share 3 key-value heads"),
        ("--micro-batch 3", "cannot be cut into micro-batches of 3"),
        ("--length 100000", "fewer than one window of 100001"),
        ("--tokens 0", "above zero"),
        ("--corpus nowhere", "holds no prepared corpus"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options: str, sentence: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=sentence):
        _train(corpus, tmp_path / "m", options=options)
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_a_finished_model_is_not_overwritten(corpus: Path, trained: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="holds a finished model already"):
        _train(corpus, trained)
    assert (trained / "model.safetensors").read_bytes() == before


def test_training_imports_torch_numpy_and_transformers_alone() -> None:
    imported = set()
    for path in [EXAMPLES / "train.py", *(EXAMPLES / "training").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy", "transformers", "training"}


# -------------------------------------------------------------------------------------- what comes out


def test_the_package_prunes_the_model(trained: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16 and model.config.pad_token_id is None
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("model.layers", 2)
    pruner = CalibPruner.from_pretrained(
        str(trained), sources={"notes:general": NOTES * 4}, sparsity="50%", length=32, samples=8, capabilities="none"
    )
    record = pruner.prune()
    assert record.prune.zeros == record.prune.weights // 2
    pruner.save_pretrained(tmp_path / "sparse")
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").eos_token == "<|end|>"


def test_fused_attention_gives_what_transformers_gives(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("causal_attention")
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)


def test_a_model_is_scored_on_the_probe_files(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes.main(["--items", "4", "--output", str(tmp_path)])
    score.main([str(trained), "--probes", str(tmp_path), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["general", "commonsense", "code", "math"]
    assert all(re.search(r"(0|1)\.\d{3} of 4 items$|not measured", line) for line in lines)
    with pytest.raises(SystemExit, match=re.escape("general.jsonl is not there; write the four files with")):
        score.main([str(trained), "--probes", str(trained)])


# -------------------------------------------------------------------------------------- sizes and schedule


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_of_their_name(preset: str) -> None:
    shape = PRESETS[preset].shape
    with torch.device("meta"):
        model = make_model(shape, 2048, 512, seed=0)
    assert shape.parameters(2048) == model.num_parameters()
    assert shape.parameters(2048) / 1e6 == pytest.approx(
        {"pocket": 3.05, "50m": 51.5, "160m": 161.8}[preset], abs=0.06
    )


def test_the_50m_preset_fits_ten_minutes_of_an_h100() -> None:
    preset = PRESETS["50m"]
    speed = 0.4 * 989e12 / (6 * preset.shape.parameters(2048))  # tokens/s at 40 % of the dense bf16 peak
    assert preset.shape.parameters(2048) - 2048 * 640 >= 50e6
    assert 7 * 60 < preset.tokens / speed < 9 * 60


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    assert [learning_rate(step, 0.0, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(99, STABLE_UNTIL - 1e-9, 4) == 1.0
    assert learning_rate(99, (1 + STABLE_UNTIL) / 2, 4) == pytest.approx(0.5)
    assert learning_rate(99, 0.9999, 4) == LAST


def test_a_budget_of_both_ends_with_the_first() -> None:
    assert Budget(tokens=100).used(25, 1e9) == 0.25
    assert Budget(tokens=100, minutes=1).used(25, 30) == 0.5
    with pytest.raises(ValueError, match="give one of them"):
        Budget()


def test_initial_weights_are_drawn_by_the_seed_alone() -> None:
    shape, state = Shape(64, 1, 4, 2, 96), torch.random.get_rng_state()
    first, again, other = (make_model(shape, 300, 32, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
