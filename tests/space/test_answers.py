# SPDX-License-Identifier: Apache-2.0
"""Answers of the dense and of the pruned model: what they are, how they end, and what stays of them."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_calibprune import pocket


sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import answers
import zero
from answers import AnswerRun, encode
from limits import Job, Question
from visitors import Visitors
from watch import STOPPED


PROMPT = "Question: What is the capital of Canada?\nAnswer:"


@pytest.fixture(scope="module")
def visitors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitors]:
    """With a result of the visitor "one"."""
    folder = tmp_path_factory.mktemp("space")
    visitors = Visitors(folder / "visitors", folder / "files")
    run = visitors.prune("one", Job(samples=4, sparsity="70%", capabilities=("general",)))
    while run.wait(1.0):
        pass
    yield visitors
    visitors.leave("one")


def finished(run: AnswerRun) -> AnswerRun:
    while run.wait(0.05):
        pass
    return run


def test_both_answer_as_their_models_do_and_leave_no_model_behind(visitors: Visitors) -> None:
    before = sum(issubclass(type(found), PreTrainedModel) for found in gc.get_objects())
    run = finished(visitors.answer("one", Question(PROMPT, 24)))
    assert run.error == ""
    assert sum(issubclass(type(found), PreTrainedModel) for found in gc.get_objects()) == before
    for state, folder in (("dense", pocket.MODEL), ("sparse", visitors.result("one").folder / "model")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        [ids] = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        assert run.texts[state] == tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run.texts["dense"].startswith(" Ottawa")
    assert run.texts["dense"] != run.texts["sparse"]


def test_there_are_two_texts_while_the_models_are_loaded(visitors: Visitors, monkeypatch: pytest.MonkeyPatch) -> None:
    load = answers._load
    monkeypatch.setattr(answers, "_load", lambda *given: time.sleep(2 * zero.EVERY) or load(*given))
    run = visitors.answer("one", Question(PROMPT, 8))
    looks = []
    while run.wait(zero.EVERY):
        looks.append(run.texts)
    assert looks[0] == {"dense": "", "sparse": ""}
    assert all(run.texts.values())


def test_answers_stop_when_asked_to_and_in_time(visitors: Visitors, monkeypatch: pytest.MonkeyPatch) -> None:
    run = visitors.answer("one", Question(PROMPT, 256, temperature=1.0))
    run.stop()
    assert run.error == STOPPED
    monkeypatch.setattr(AnswerRun, "limit", 0.0)
    assert "longer than" in finished(visitors.answer("one", Question(PROMPT, 256))).error
    assert visitors.result("one").folder.exists(), "the result stays"


def test_who_has_no_result_is_told_so(visitors: Visitors) -> None:
    with pytest.raises(ValueError, match="no result yet"):
        visitors.answer("two", Question(PROMPT))


def test_a_prompt_longer_than_the_context_is_refused(visitors: Visitors) -> None:
    error = finished(visitors.answer("one", Question("\N{SNOWMAN}" * 500))).error
    assert "that is more than the 1,024 that this model reads" in error


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    assert tokenizer.decode(encode("Hello", tokenizer)["input_ids"][0]) == "Hello"
    tokenizer.chat_template = "{% for m in messages %}User: {{ m.content }}\nBot:{% endfor %}"
    assert tokenizer.decode(encode("Hello", tokenizer)["input_ids"][0]) == "User: Hello\nBot:"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="does not take the prompt"):
        encode("Hello", tokenizer)
