# SPDX-License-Identifier: Apache-2.0
"""A prompt in, two answers out: of a result of this page, and of the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

import zero
from limits import ANSWER_SECONDS, Job, Question, check_size
from optimum_calibprune import CalibPruner
from runs import PruneRun, Run
from watch import STATES, Watch
from work import downloads


class AnswerRun(Run):
    """Both models of a result answer; `texts` grow token by token."""

    limit = ANSWER_SECONDS

    def __init__(self, question: Question, result: PruneRun) -> None:
        super().__init__(result.folder)
        self.question, self._result = question, result

    def perform(self) -> None:
        assert self._result.record is not None
        revision = self._result.record.base.revision
        check_size(self._result.job.model, revision)
        zero.do(self, _gpu_seconds, answer, self.question, self._result.job, revision, self.folder)

    def remove(self) -> None:
        """The folder is that of the result, which stays."""


def _gpu_seconds() -> int:
    return 60


def answer(watch: Watch, question: Question, job: Job, revision: str | None, folder: Path) -> None:
    """Both models answer at the same time. They are loaded for this, and go afterwards."""
    models = [_load(state, watch, job, revision, folder) for state in STATES]
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(partial(_answer, watch, question), STATES, models))


def _load(state: str, watch: Watch, job: Job, revision: str | None, folder: Path) -> CalibPruner:
    """As for pruning: no code that comes with a model, and no pickles."""
    watch.check()
    options = {"sparsity": job.sparsity, "capabilities": "none", "stream": False}
    if state == "sparse":
        return CalibPruner.from_pretrained(str(folder / "model"), **options)
    return CalibPruner.from_pretrained(job.model, revision=revision, cache_dir=downloads(folder), **options)


def _answer(watch: Watch, question: Question, state: str, pruner: CalibPruner) -> None:
    model, tokenizer = pruner.model, pruner.tokenizer
    prompt = encode(question.prompt, tokenizer)
    tokens = prompt["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and tokens + question.new_tokens > context:
        raise ValueError(
            f"The prompt has {tokens:,} tokens; with {question.new_tokens} new ones that is more than the {context:,} "
            "that this model reads. Shorten it, or ask for fewer new tokens."
        )

    def say(text: str) -> None:
        watch.check()
        watch.texts[state] = text

    kept = model.generation_config
    model.generation_config = type(kept)(  # only its end; a repo may ask for anything
        eos_token_id=kept.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
        max_new_tokens=question.new_tokens,
        do_sample=question.temperature > 0,
        temperature=question.temperature or None,
    )
    model.generate(**{name: ids.to(model.device) for name, ids in prompt.items()}, streamer=Stream(tokenizer, say))


def encode(prompt: str, tokenizer: Any) -> dict[str, Any]:
    """Ids and mask `[1, tokens]`: as a message where the tokenizer has a chat template, else as text to go on with."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        try:
            found = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise ValueError("The chat template of this model does not take the prompt.") from error
    else:
        found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


class Stream:
    """What `generate` hands its tokens to, the prompt's `[1, tokens]` first, then one by one: the text so far goes to `say`,
    which may raise."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] | None = None

    def put(self, ids: Any) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._say(text.removesuffix("\N{REPLACEMENT CHARACTER}"))  # half a character

    def end(self) -> None:
        """Nothing is held back."""
