# SPDX-License-Identifier: Apache-2.0
"""What the writer draws is what transformers would: rows of different length, ends, limits, seeds, both engines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_calibprune.calibration.writer import Sampling, _draw, end_tokens, write, write_batch, write_continuously
from tests.pruning.test_families import FAMILIES


GREEDY = Sampling(1e-4, 1e-4)  # so cold that only the most likely token is drawn
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
WITHOUT_END = SimpleNamespace(eos_token_id=None)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, initializer_range=0.2)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_padded_batch_is_written_as_if_alone(family: str) -> None:
    torch.manual_seed(1)
    tiny = AutoModelForCausalLM.from_config(FAMILIES[family].config()).float().eval()
    for name, parameter in tiny.named_parameters():  # logits far apart, so that rounding changes no choice
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    written = write_batch(tiny, PROMPTS, GREEDY, [], 16, seed=0)
    for prompt, text in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([prompt])
        alone = tiny.generate(ids, do_sample=False, max_new_tokens=16 - len(prompt), eos_token_id=None, pad_token_id=0)
        assert text == alone[0, len(prompt) :].tolist()


def test_both_engines_draw_the_most_likely_tokens(model: LlamaForCausalLM) -> None:
    batch = write_batch(model, PROMPTS, GREEDY, [], 24, seed=0)
    memory = {"num_blocks": 16, "page_size": 16, "max_batch_tokens": 32}
    assert write_continuously(model, PROMPTS, GREEDY, [], 24, seed=0, **memory) == batch
    end = batch[0][4]
    expected = [text[: text.index(end)] if end in text else text for text in batch]
    assert write_continuously(model, PROMPTS, GREEDY, [end], 24, seed=0, **memory) == expected


def test_a_document_ends_at_an_end_token_or_at_its_length(model: LlamaForCausalLM) -> None:
    long = write_batch(model, PROMPTS, GREEDY, [], 24, seed=0)
    assert [len(prompt) + len(text) for prompt, text in zip(PROMPTS, long, strict=True)] == [24] * 3
    end = long[1][2]
    short = write_batch(model, PROMPTS, GREEDY, [end, 63], 24, seed=0)
    assert short == [text[: text.index(end)] if end in text else text for text in long]
    assert len(short[1]) <= 2


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: LlamaForCausalLM) -> None:
    first = write(model, WITHOUT_END, PROMPTS, Sampling(), length=24, seed=3)
    torch.rand(5)  # the state of the caller's generator does not matter
    assert write(model, WITHOUT_END, PROMPTS, Sampling(), length=24, seed=3) == first
    assert write(model, WITHOUT_END, PROMPTS, Sampling(), length=24, seed=4) != first


def test_tokens_are_drawn_with_the_probabilities_of_the_temperature() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        drawn = _draw(
            logits, torch.zeros(20_000, 1, dtype=torch.long), Sampling(temperature, temperature), 0, generator
        )
        expected = np.array([0.6, 0.3, 0.1]) ** (1 / temperature)
        shares = np.bincount(drawn.numpy(), minlength=3) / 20_000
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.012)  # three standard errors


def test_top_k_top_p_and_repetition_penalty_change_what_can_be_drawn() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])).expand(2000, 4)
    generator = torch.Generator().manual_seed(0)

    def drawn(text: list[int], sampling: Sampling) -> set[int]:
        rows = torch.tensor([text]).expand(2000, -1)
        return set(_draw(logits.clone(), rows, sampling, 0, generator).tolist())

    assert drawn([0], Sampling(top_k=2)) == {0, 1}
    assert drawn([0], Sampling(top_p=0.65)) == {0, 1}
    # Log-probabilities are negative, so the penalty multiplies them: token 0 falls from 0.4 to 0.4^20.
    assert drawn([0], Sampling(repetition_penalty=20.0)) == {1, 2, 3}


def test_the_temperature_moves_linearly_and_stays() -> None:
    sampling = Sampling(t_initial=2.0, t_final=1.0, tokens=4)
    assert [sampling.temperature(step) for step in (0, 1, 2, 4, 9)] == [2.0, 1.75, 1.5, 1.0, 1.0]
    assert not sampling.constant
    assert Sampling(0.7, 0.7, tokens=10).constant
    assert not Sampling(repetition_penalty=1.2).constant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_final": 0.0}, "temperature must be positive"),
        ({"t_initial": -1.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.5}, "top_p must lie"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_a_sampling_that_means_nothing_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_end_tokens_are_the_tokenizers_and_the_models(model: LlamaForCausalLM) -> None:
    model.generation_config.eos_token_id = [7, 8]
    try:
        assert end_tokens(model, SimpleNamespace(eos_token_id=2)) == [2, 7, 8]
        assert end_tokens(model, SimpleNamespace(eos_token_id=8)) == [8, 7]
        model.generation_config.eos_token_id = None
        assert end_tokens(model, WITHOUT_END) == []
    finally:
        model.generation_config.eos_token_id = 2
