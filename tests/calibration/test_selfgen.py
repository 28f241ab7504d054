# SPDX-License-Identifier: Apache-2.0
"""The pocket writes its own calibration text: what is asked for, what is packed, what is cached, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_calibprune import CalibPruner, pocket
from optimum_calibprune.calibration import selfgen, store
from optimum_calibprune.calibration.measure import likelihood
from optimum_calibprune.calibration.sources import OpenSource
from optimum_calibprune.calibration.writer import Sampling
from optimum_calibprune.records import CAPABILITIES, CalibrationSource, MixRule


END, LENGTH = 0, 32
SELF_CAL = MixRule.parse("self-cal:t_initial=0.8,t_final=0.8")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.MODEL)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[int], int], list[int]]], list[int]]:
    """Replaces the model's writing by a function of prompt and count; the list grows by the rows of each batch."""

    def use(text: Callable[[list[int], int], list[int]]) -> list[int]:
        batches: list[int] = []

        def write(_model: object, _tokenizer: object, prompts: list[list[int]], *_: object, **__: object) -> object:
            batches.append(len(prompts))
            start = sum(batches[:-1])
            return [text(prompt, start + i) for i, prompt in enumerate(prompts)]

        monkeypatch.setattr(selfgen, "write", write)
        return batches

    return use


def request(rule: MixRule, tokenizer: PreTrainedTokenizerBase, which: int = 0, **others: object) -> selfgen.Request:
    return selfgen.request(selfgen.written_sources(rule)[which].source, rule, tokenizer, **others)


# ------------------------------------------------------------------------------------------- what is asked for


def test_self_cal_begins_with_nothing_and_keeps_nothing_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = request(MixRule.parse("self-cal:t_initial=2,t_final=1,tokens=5"), tokenizer)
    assert asked.prompts == [[END]]
    assert asked.hidden == 1
    assert asked.sampling == Sampling(2.0, 1.0, tokens=5)
    assert asked.source.capability == "any"


def test_without_a_begin_token_self_cal_begins_with_the_end_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    assert request(SELF_CAL, tokenizer).prompts == [[END]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither"):
        request(SELF_CAL, tokenizer)


def test_sgs_continues_the_beginnings_of_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The city of Paris lies in France.", "One day Tom was hungry.", "x"]
    corpus = OpenSource(CalibrationSource("mine", "general"), texts)
    asked = request(MixRule.parse("sgs:prefix=3"), tokenizer, corpora=[corpus])
    beginnings = [[END, *tokenizer(text)["input_ids"][:3]] for text in texts[:2]]
    assert sorted(asked.prompts) == sorted(beginnings)
    assert asked.sampling == Sampling(0.6, 0.6, top_k=50, top_p=0.95, repetition_penalty=1.2)
    assert (asked.hidden, asked.keep) == (1, 0.8)
    with pytest.raises(ValueError, match=r"at least 9 tokens; its sources \(mine\) hold none"):
        request(MixRule.parse("sgs:prefix=9"), tokenizer, corpora=[OpenSource(corpus.source, ["x", "y"])])


def test_proposals_begin_with_the_seeds_of_their_capability(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    table = {name: [f"{name} one", f"{name} two"] for name in CAPABILITIES}
    path = tmp_path / "seeds.json"
    path.write_text(json.dumps(table))
    rule = MixRule.parse("igsp")
    for which, name in enumerate(CAPABILITIES):
        asked = request(rule, tokenizer, which, seed_texts=path)
        assert asked.source.capability == name
        assert [tokenizer.decode(prompt[1:]) for prompt in asked.prompts] == table[name]


def test_the_bundled_seeds_are_a_table_of_short_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    table = selfgen.read_seeds()
    assert set(table) == set(CAPABILITIES)
    assert all(len(tokenizer(text)["input_ids"]) <= 16 for texts in table.values() for text in texts)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"general": ["a"]}'),
        '{"general": [], "commonsense": ["a"], "code": ["a"], "math": ["a"]}',
        '{"general": [1], "commonsense": ["a"], "code": ["a"], "math": ["a"]}',
        '{"general": "The", "commonsense": ["a"], "code": ["a"], "math": ["a"]}',
        '{"general": ["a"], "commonsense": ["a"], "code": ["a"], "math": [" "]}',
        '{"general": ["a"], "commonsense": ["a"], "code": ["a"], "math": ["a"], "law": ["a"]}',
    ],
)
def test_another_table_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "seeds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is no table of seeds; allowed|cannot be read"):
        selfgen.read_seeds(path)
    with pytest.raises(ValueError, match="cannot be read"):
        selfgen.read_seeds(tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------- what is written


def test_the_same_seed_writes_the_same_samples_and_another_seed_others(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "load", lambda key: None)  # written anew each time
    asked = request(SELF_CAL, tokenizer)
    pools = [
        selfgen.write_pool(model, tokenizer, asked, windows=3, length=LENGTH, seed=seed).input_ids
        for seed in (0, 0, 1)
    ]
    assert pools[0].shape == (3, LENGTH)
    assert pools[0].tobytes() == pools[1].tobytes()
    assert pools[0].tobytes() != pools[2].tobytes()


def test_samples_that_were_written_before_come_from_the_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(SELF_CAL, tokenizer)
    first = selfgen.write_pool(model, tokenizer, asked, windows=2, length=LENGTH, seed=0)
    monkeypatch.setattr(selfgen, "write", None)  # whoever writes now, fails
    again = selfgen.write_pool(model, tokenizer, asked, windows=2, length=LENGTH, seed=0)
    assert np.array_equal(again.input_ids, first.input_ids)
    assert again.source == first.source
    with pytest.raises(TypeError):
        selfgen.write_pool(model, tokenizer, asked, windows=2, length=LENGTH, seed=1)
    (file,) = store.place("x").parent.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    monkeypatch.undo()
    monkeypatch.setattr(store, "place", lambda key: file)
    healed = selfgen.write_pool(model, tokenizer, asked, windows=2, length=LENGTH, seed=0)
    assert np.array_equal(healed.input_ids, first.input_ids)


def test_short_documents_are_packed_and_never_padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    written(lambda prompt, i: [100 + i % 900] * (5 + i % 7))
    pool = selfgen.write_pool(model, tokenizer, request(SELF_CAL, tokenizer), windows=9, length=LENGTH, seed=0)
    stream, expected, i = pool.input_ids.flatten().tolist(), [], 0
    while len(expected) < len(stream):
        expected += [100 + i % 900] * (5 + i % 7) + [END]
        i += 1
    assert stream == expected[: len(stream)]


def test_a_document_of_full_length_is_a_sample_of_its_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    written(lambda prompt, i: [100 + i] * (LENGTH if i % 2 else 20))
    pool = selfgen.write_pool(model, tokenizer, request(SELF_CAL, tokenizer), windows=6, length=LENGTH, seed=0)
    whole = [row for row in pool.input_ids.tolist() if len(set(row)) == 1]
    assert len(whole) >= 3
    assert all(END not in row for row in whole)


def test_seeds_are_part_of_their_documents_and_the_begin_token_is_not(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    written(lambda prompt, i: [7] * 6)
    asked = request(MixRule.parse("igsp"), tokenizer, 3)
    pool = selfgen.write_pool(model, tokenizer, asked, windows=4, length=LENGTH, seed=0)
    documents = ",".join(map(str, pool.input_ids.flatten().tolist())).split(f",{END},")
    begins = {",".join(map(str, prompt[1:])) for prompt in asked.prompts}
    assert all(document.removesuffix(",7" * 6) in begins for document in documents[:-1])
    assert len(documents) > 4


def test_documents_with_the_highest_perplexity_are_dropped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    likely = tokenizer("Question: What is the capital of France?\nAnswer: Paris")["input_ids"]
    unlikely = np.random.default_rng(0).integers(1, 2048, len(likely)).tolist()
    written(lambda prompt, i: unlikely if i % 5 == 4 else likely)  # the first fifth of a batch that begins at 0
    asked = selfgen.Request(CalibrationSource("sgs", "any", written="sgs"), [[END]], Sampling(), 1, keep=0.8)
    pool = selfgen.write_pool(model, tokenizer, asked, windows=6, length=LENGTH, seed=0)
    assert set(pool.input_ids.flatten().tolist()) <= {*likely, END}


def test_the_loss_of_documents_of_different_lengths_is_that_of_each_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = [tokenizer(text)["input_ids"] for text in ("One day Tom was hungry.", "def f(x):", "The city of")]
    alone = [float(likelihood(model, np.array([document])).nll[0]) for document in documents]
    np.testing.assert_allclose(selfgen._losses(model, documents), alone, atol=0.02)  # bf16: rows of another width


def test_a_model_that_writes_nothing_is_refused_in_a_sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    batches = written(lambda prompt, i: [])
    with pytest.raises(ValueError, match="The model writes nothing for 'self-cal'"):
        selfgen.write_pool(model, tokenizer, request(SELF_CAL, tokenizer), windows=1, length=LENGTH, seed=0)
    assert selfgen.BARREN <= sum(batches) < 2 * selfgen.BARREN


def test_a_model_that_mostly_writes_nothing_is_waited_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Callable
) -> None:
    written(lambda prompt, i: [9] * 10 if i % 40 == 39 else [])
    pool = selfgen.write_pool(model, tokenizer, request(SELF_CAL, tokenizer), windows=2, length=LENGTH, seed=0)
    assert len(pool.input_ids) == 2


def test_without_an_end_token_documents_run_to_their_length(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    tokenizer.bos_token, tokenizer.eos_token = "!", None
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    pool = selfgen.write_pool(model, tokenizer, request(SELF_CAL, tokenizer), windows=2, length=LENGTH, seed=0)
    assert pool.input_ids.shape == (2, LENGTH)
    assert pool.source.pool["documents"] == str(2 + 1)  # a quarter more than needed, each a sample of its own


def test_degenerate_loops_stay_among_the_candidates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """So cold a draw repeats itself; nothing in this room removes that, the selection has to."""
    asked = request(MixRule.parse("igsp:temperature=0.01"), tokenizer, 2)
    ids = selfgen.write_pool(model, tokenizer, asked, windows=6, length=128, seed=0).input_ids
    distinct = [len({tuple(row[i : i + 4]) for i in range(125)}) for row in ids.tolist()]
    assert min(distinct) < 60


# ------------------------------------------------------------------------------------------------ end to end


def test_of_text_that_loops_and_text_that_does_not_a_run_takes_the_latter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    written = []
    for temperature in (0.01, 0.7):
        asked = request(MixRule.parse(f"igsp:temperature={temperature}"), tokenizer, 3)
        written.append(selfgen.write_pool(model, tokenizer, asked, windows=16, length=128, seed=0).input_ids)
    both = np.concatenate(written)
    settings = {"sources": {"both:math": both}, "samples": 8, "length": 128, "capabilities": "none"}
    chosen = CalibPruner.from_pretrained("pocket", **settings).choose_calibration().calibration.input_ids
    offered, taken = (
        np.sort([len({tuple(row[i : i + 4]) for i in range(125)}) for row in ids.tolist()]) for ids in (both, chosen)
    )
    assert offered[3] < 0.5 * offered[-8] <= taken[0]


@pytest.mark.parametrize(
    ("mix", "sources", "origins"),
    [
        ("self-cal:t_initial=0.8,t_final=0.8", None, {"self-cal"}),
        ("sgs", None, {"sgs"}),
        ("sgs", ["textbooks", "piqa"], {"sgs"}),
        ("igsp:oversample=2", None, {f"self:{name}" for name in CAPABILITIES}),
        ("igsp:oversample=2", ["self", "gsm8k"], {*(f"self:{name}" for name in CAPABILITIES), "gsm8k"}),
    ],
)
def test_a_run_with_text_of_the_models_own(mix: str, sources: list[str] | None, origins: set[str]) -> None:
    settings = {"mix": mix, "sources": sources, "samples": 8, "length": 32, "capabilities": "none"}
    pruner = CalibPruner.from_pretrained("pocket", **settings)
    record = pruner.prune()
    assert {row.origin for row in record.rows} <= origins
    assert len(record.rows) == 8
    assert {source.name for source in record.sources} == origins
    assert type(record).from_json(record.to_json()) == record
    again = CalibPruner.from_pretrained("pocket", **settings)
    assert again.choose_calibration().calibration.fingerprint == record.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "self-cal", "sources": ["gsm8k"]}, "is written by the model alone"),
        ({"mix": "uniform", "sources": ["self", "gsm8k"]}, "'self' is for the mix 'igsp'"),
        ({"mix": "uniform", "seed_texts": "x.json"}, "the mix is 'uniform'"),
        ({"mix": "igsp", "seed_texts": "no-such.json"}, "cannot be read"),
        ({"mix": "self-cal:t_final=0"}, "temperature must be positive"),
        ({"mix": "sgs:keep=0"}, "keep"),
        ({"mix": "igsp:oversample=0.5"}, "oversample"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibPruner.from_pretrained("no/such-model", **settings)
