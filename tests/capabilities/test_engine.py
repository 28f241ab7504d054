# SPDX-License-Identifier: Apache-2.0
"""The engine answers lm-eval's requests as lm-eval's own engine for transformers models does, on the dense pocket and a sparse one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from optimum_calibprune import pocket
from optimum_calibprune.capabilities.engine import Engine


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
