# SPDX-License-Identifier: Apache-2.0
"""The engine answers lm-eval's requests as lm-eval's own engine for transformers models does, on the dense pocket and a sparse one."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import wraps
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_calibprune import pocket
from optimum_calibprune.capabilities import batches
from optimum_calibprune.capabilities.batches import by_beginning, of_similar_length, shared_beginning
from optimum_calibprune.capabilities.engine import Engine
from tests.pruning.test_families import FAMILIES


ITEMS = 40
STOPS = {"math": ["\n"], "code": ["\n\n"]}


@pytest.fixture(scope="module", params=["dense", "sparse"])
def engines(request: pytest.FixtureRequest) -> tuple[Engine, HFLM]:
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    if request.param == "sparse":  # 30 % by magnitude: it still writes, and often the wrong thing
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "proj" in name:
                    weight[weight.abs() <= weight.abs().flatten().quantile(0.3)] = 0
    return Engine(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")


def items(capability: str) -> list[dict[str, Any]]:
    lines = pocket.probes()[capability].read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:ITEMS]]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.mark.parametrize("capability", ["general", "commonsense"])
def test_likelihoods_are_those_of_lm_eval(engines: tuple[Engine, HFLM], capability: str) -> None:
    pairs = [(item["prompt"], choice) for item in items(capability) for choice in item["choices"]]
    asked = requests("loglikelihood", [*pairs, *pairs[:3]])  # some requests twice
    ours, theirs = (engine.loglikelihood(asked, disable_tqdm=True) for engine in engines)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({value for value, _ in ours}) > ITEMS


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_choice(engines: tuple[Engine, HFLM]) -> None:
    asked = requests("loglikelihood", [("The capital of France is ", "Paris"), ("One day ", "Tom"), ("", "One day")])
    ours, theirs = (engine.loglikelihood(asked, disable_tqdm=True) for engine in engines)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


@pytest.mark.parametrize("capability", ["math", "code"])
def test_texts_are_those_of_lm_eval(engines: tuple[Engine, HFLM], capability: str) -> None:
    options = {"until": STOPS[capability], "do_sample": False, "max_gen_toks": 32}
    asked = requests("generate_until", [(item["prompt"], options) for item in items(capability)])
    ours, theirs = (engine.generate_until(asked, disable_tqdm=True) for engine in engines)
    assert ours == theirs
    assert len(set(ours)) > ITEMS / 2


def test_requests_with_other_stops_and_limits_are_kept_apart(engines: tuple[Engine, HFLM]) -> None:
    prompt = items("math")[0]["prompt"]
    several = [
        {"until": ["\n"], "max_gen_toks": 20},
        {"until": ["="], "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 3},
    ]
    asked = requests("generate_until", [(prompt, {**options, "do_sample": False}) for options in several])
    ours, theirs = (engine.generate_until(asked, disable_tqdm=True) for engine in engines)
    assert ours == theirs
    assert len(set(ours)) == 3


def test_a_prompt_beyond_the_context_loses_its_beginning(engines: tuple[Engine, HFLM]) -> None:
    prompt = "One day Tom was hungry. " * 200 + items("math")[0]["prompt"]
    asked = requests("generate_until", [(prompt, {"until": ["\n"], "do_sample": False, "max_gen_toks": 12})])
    ours, theirs = (engine.generate_until(asked, disable_tqdm=True) for engine in engines)
    assert ours == theirs


def test_a_prompt_beyond_the_context_loses_its_beginning_before_choices_too(engines: tuple[Engine, HFLM]) -> None:
    prompt = "One day Tom was hungry. " * 200 + "Then he"
    asked = requests("loglikelihood", [(prompt, " ate."), (prompt, " went home and ate the bread."), ("Tom", " ate.")])
    ours, theirs = (engine.loglikelihood(asked, disable_tqdm=True) for engine in engines)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_answers_longer_than_the_context_are_refused_in_a_sentence(engines: tuple[Engine, HFLM]) -> None:
    engine = engines[0]
    long = " bread" * 3000
    with pytest.raises(
        ValueError, match=r"the answer 'Tom ate bread.* has \d+ tokens; .* at most the 1024 of the model"
    ):
        engine.loglikelihood(requests("loglikelihood", [("Tom ate", long)]))
    with pytest.raises(ValueError, match="its texts may have 1024 tokens, which must fit with the prompt into"):
        engine.generate_until(requests("generate_until", [("Tom", {"until": ["."], "max_gen_toks": 1024})]))


# ------------------------------------------------------------------------------------- any model and tokenizer


def words() -> PreTrainedTokenizerFast:
    """A token a word, without a padding token or any other special one but the end."""
    vocabulary = {"</s>": 0, **{f"w{i}": i for i in range(1, 64)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tiny(family: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config()).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.generation_config.eos_token_id = 0
    return model


CHOICES = [("w3 w4 w5", f" {text}") for text in ("w6", "w7 w8 w9", "w6 w10 w11 w12 w13 w14 w15", "w7 w8")]
CHOICES += [("w9 w3 w8 w5", f" {text}") for text in ("w6 w8", "w3")] + [("w3 w4 w5 w9 w2 w20", " w6 w7")]


@pytest.mark.parametrize("shared_tokens", [64, 2], ids=["alone", "shared beginning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_with_lm_eval_whatever_carries_its_text_on(
    family: str, shared_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHARED_TOKENS", shared_tokens)
    model, tokenizer = tiny(family), words()
    engine = Engine(model, tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=words(), batch_size=1, device="cpu")
    asked = requests("loglikelihood", CHOICES)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = engine.loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3, rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert tokenizer.pad_token is None, "the caller's tokenizer is as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_writes_with_lm_eval_after_a_beginning_that_is_computed_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHARED_TOKENS", 3)
    model = tiny(family)
    engine = Engine(model, words())
    computed: list[int] = []
    cache_of = engine._cache_of
    monkeypatch.setattr(engine, "_cache_of", lambda tokens: computed.append(len(tokens)) or cache_of(tokens))
    theirs = HFLM(pretrained=model, tokenizer=words(), batch_size=1, device="cpu")
    rests = ["w7", "w9 w2 w20", "w1 w1 w2 w30 w7 w8", "w9 w2 w21 w4"]
    asked = requests(
        "generate_until", [(f"w3 w4 w5 w6 {rest}", {"until": ["w9"], "max_gen_toks": 6}) for rest in rests]
    )
    texts = engine.generate_until(asked)
    assert texts == theirs.generate_until(asked, disable_tqdm=True)
    assert any(texts)
    assert computed == [4 if engine._continues and engine._shares else 0]


def test_a_batch_shares_what_all_of_it_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHARED_TOKENS", 3)
    assert shared_beginning([(1, 2, 3, 4, 5), (1, 2, 3, 9), (1, 2, 3, 4)]) == 3
    assert shared_beginning([(1, 2, 3, 4), (1, 2, 3)]) == 0, "each keeps a token of its own"
    assert shared_beginning([(1, 2, 3, 4), (1, 2, 4, 4)]) == 0


def test_prompts_are_parted_by_what_they_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHARED_TOKENS", 3)
    prompts = sorted([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 2, 3, 9), (7, 8, 9, 1), (7, 8, 9), (5, 5), (6, 5, 4, 3)])
    assert by_beginning(prompts) == [
        (0, [(5, 5), (6, 5, 4, 3), (7, 8, 9), (7, 8, 9, 1)]),  # what is shared leaves each a token of its own
        (3, [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 2, 3, 9)]),
    ]
    long = (1, 2, 3, 4, 5, 6, 7, 8)
    assert by_beginning([(*long, 9), (*long, 10), (*long[:3], 9)]) == [
        (0, [(1, 2, 3, 9)]),
        (8, [(*long, 9), (*long, 10)]),
    ]


def test_rows_are_parted_so_that_little_is_padded() -> None:
    rows = [(0,) * length for length in (3, 40, 10, 33, 12, 9, 31)]
    assert [[len(row) for row in group] for group in of_similar_length(rows, len)] == [[40, 33, 31], [12, 10, 9], [3]]


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_batches_are_halved_where_memory_runs_out(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, most = tiny(family), 3
    forward, sizes = model.forward, []

    @wraps(forward)
    def limited(*args: Any, **inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **inputs)

    asked = requests("loglikelihood", [(f"w{i} w{i + 1}", f" w{i + 2} w{i % 7 + 1}") for i in range(1, 40)])
    texts = requests(
        "generate_until", [(f"w{i} w{i + 1}", {"until": ["w9"], "max_gen_toks": 6}) for i in range(1, 20)]
    )
    free = Engine(model, words())
    expected, written = free.loglikelihood(asked), free.generate_until(texts)
    engine = Engine(model, words())
    monkeypatch.setattr(model, "forward", limited)
    with caplog.at_level(logging.WARNING):
        found = engine.loglikelihood(asked)
        assert engine.generate_until(texts) == written
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert max(sizes) > most >= sorted(sizes)[len(sizes) // 2]
    assert "Out of GPU memory: batches are halved, from 39 texts." in caplog.text
    most = 0
    beginning = " ".join(f"w{i % 9}" for i in range(100))
    alike = requests("loglikelihood", [(f"{beginning} w{i}", " w1 w2") for i in range(4)])
    for too_large in (asked, alike):
        with pytest.raises(MemoryError, match="Out of GPU memory with a single text"):
            engine.loglikelihood(too_large)


def test_texts_are_counted_while_their_batch_is_written() -> None:
    engine, seen = Engine(tiny("llama"), words()), []
    engine.on_answers = lambda done, total: seen.append((done, total))
    texts = engine.generate_until(
        requests("generate_until", [(f"w{i}", {"until": [f"w{i % 9}"], "max_gen_toks": 30}) for i in range(1, 30)])
    )
    assert len({len(text) for text in texts}) > 2, "they end at different steps"
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen if 0 < done < 29}) > 2
    assert seen[-1] == (29, 29)
