# SPDX-License-Identifier: Apache-2.0
"""Scores a model on tasks: lm-eval asks the model and scores the benchmarks, the probes are scored here."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..records import Scores, TaskScore
from . import contamination, store
from .benchmarks import Benchmark
from .harness import Loaded, fingerprint, load
from .metrics import described, item_scores, name_of
from .sandbox import SandboxUnavailable, Verdict, check_programs, isolation
from .tasks import Task, lm_eval_config, read


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .engine import Engine
    from .metrics import Metric


logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Responses = list[list[Any]]  # for each item what lm-eval returned: (log-likelihood, greedy) a choice, or one text


class Probes:
    """A task of the pocket's kind with its items, ready to be asked."""

    def __init__(self, task: Task) -> None:
        from lm_eval.tasks import TaskManager

        self.task = task
        self.name, self.capability, self.shots, self.data = task.name, task.capability, 0, task.path.name
        self.runs_code = task.runs_code
        self.settled = True  # False after scores in which a program ran out of wall-clock time
        self._part = TaskManager(include_defaults=False).load([lm_eval_config(task)])["tasks"][task.name]
        self._part.build_all_requests()

    def requests(self) -> list[Instance]:
        return self._part.instances

    def items(self) -> int:
        return len(self._part.eval_docs)

    def chance(self) -> float:
        return self.task.chance

    def texts(self) -> list[str]:
        return [contamination.item_text(item) for item in read(self.task)]

    @property
    def writes(self) -> bool:
        return self.task.kind == "exact_match"

    def references(self) -> list[Any]:
        return [str(item["target"]) for item in read(self.task)]

    def fingerprint(self) -> str:
        return fingerprint(self.requests(), self.task.kind, self.task.marker)

    def scores(self, answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[float, ...]]:
        responses: dict[int, list[Any]] = {}
        for request, answer in zip(self.requests(), answers, strict=True):
            responses.setdefault(request.doc_id, []).append(answer)
        if self.runs_code:
            verdicts = _verdicts(self.task, list(responses.values()))
            self.settled = all(verdict.settled for verdict in verdicts)
            return self.task.kind, tuple(float(verdict.passed) for verdict in verdicts)
        return self.task.kind, score(self.task, list(responses.values()), tokenizer)


@dataclass
class Prepared:
    """Tasks with their data, and why others cannot be had here: by task, its capability and the reason."""

    tasks: list[Loaded | Probes] = field(default_factory=list)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def not_measured(self, measured: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Reasons by capability, where none of its tasks is left, and by task."""
        present = set(measured)
        reasons: dict[str, dict[str, list[str]]] = {}
        for task, (capability, why) in self.missing.items():
            reasons.setdefault(capability, {}).setdefault(why, []).append(task)
        capabilities = {
            capability: "; ".join(f"{why} ({', '.join(tasks)})" for why, tasks in found.items())
            for capability, found in reasons.items()
            if capability not in present
        }
        return capabilities, {task: why for task, (name, why) in self.missing.items() if name in present}


def prepare(tasks: Sequence[Task | Benchmark], *, required: bool = True, token: str | None = None) -> Prepared:
    """Reads the data of tasks. Where it cannot be had, and the tasks are not `required`, the reason is kept.

    Raises `ValueError` for required tasks, and for probes, whose files must do.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # notices about how tasks and models should be written
    prepared = Prepared()
    unreachable = ""
    for task in tasks:
        if isinstance(task, Task):
            prepared.tasks.append(Probes(task))
            continue
        try:
            if unreachable and task.data is None:
                raise ValueError(unreachable)
            prepared.tasks.append(load(task, token))
        except (ValueError, ConnectionError) as error:
            if required:
                raise ValueError(f"Task {task.name!r} cannot be measured: {str(error).rstrip('.')}.") from error
            prepared.missing[task.name] = (task.capability, str(error))
            if isinstance(error, ConnectionError):
                unreachable = "the Hub cannot be reached"
    return prepared


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | Benchmark] | Prepared,
    *,
    on_progress: Progress | None = None,
    required: bool = True,
    identity: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Scores:
    """The score of every item of every task. Generated code runs in the sandbox, or, where nothing can be isolated
    here, not at all: its task is then not measured.

    Args:
        on_progress: called with (items done, items, "task, items a second").
        required: whether a task that cannot be measured is an error; else it is named with the reason.
        identity: of the model (`store.of_model`), under which each task's scores are kept in the cache and read from there;
            None keeps none.
        metrics: by task, score the texts that the model writes for it, instead of the task's own scoring; see `metrics.py`.
    """
    from .engine import Engine

    prepared = tasks if isinstance(tasks, Prepared) else prepare(tasks, required=required)
    missing = dict(prepared.missing)
    engine = Engine(model, tokenizer)
    results = []
    for task in prepared.tasks:
        try:
            metric = (metrics or {}).get(task.name)
            results.append(
                _measured(engine, task, tokenizer, on_progress, identity if metric is None else None, metric)
            )
        except SandboxUnavailable as error:
            missing[task.name] = (task.capability, str(error))
        except ValueError as error:
            if required:
                raise ValueError(f"Task {task.name!r} cannot be measured: {error}.") from error
            missing[task.name] = (task.capability, str(error))
    capabilities, left_out = Prepared([], missing).not_measured(result.capability for result in results)
    return Scores(tuple(results), capabilities, left_out)


def _measured(
    engine: Engine,
    task: Loaded | Probes,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress | None,
    identity: str | None,
    own_metric: Metric | None,
) -> TaskScore:
    """One task, from the cache where it is there."""
    key = hashlib.sha256(f"{identity} {task.fingerprint()}".encode()).hexdigest() if identity is not None else None
    tell = on_progress or (lambda done, total, text: None)
    items = task.items()
    if key is not None and (known := store.load(key)) is not None:
        tell(items, items, f"{task.name}, from the cache")
        return replace(known, task=task.name, capability=task.capability, data=task.data)
    if own_metric is not None and not task.writes:
        raise ValueError("a metric scores texts, and of this task choices are compared or programs run")
    if task.runs_code and not isolation().available:
        raise SandboxUnavailable(isolation().reason)
    started = time.perf_counter()

    def on_answers(done: int, total: int) -> None:
        rate = items * done / total / max(time.perf_counter() - started, 1e-9)
        tell(items * done // total, items, f"{task.name}, {rate:.1f} items/s")

    tell(0, items, task.name)
    engine.on_answers = on_answers
    responses = ask(engine, task.requests())
    if own_metric is None:
        metric, values = task.scores(responses, tokenizer)
    else:
        metric, values = name_of(own_metric), _by_metric(own_metric, responses, task.references())
    result = TaskScore(
        task=task.name,
        capability=task.capability,
        metric=metric,
        chance=task.chance(),
        item_scores=values,
        fingerprint=scored(task, own_metric),
        shots=task.shots,
        data=task.data,
    )
    if key is not None and task.settled:
        store.save(key, result)
    return result


def scored(task: Loaded | Probes, own_metric: Metric | None) -> str:
    """SHA-256 of all that is asked and how it is scored."""
    asked = task.fingerprint()
    return asked if own_metric is None else hashlib.sha256(f"{asked} {described(own_metric)}".encode()).hexdigest()


def _by_metric(metric: Metric, texts: Sequence[str], references: Sequence[Any]) -> tuple[float, ...]:
    try:
        return item_scores(metric, texts, references)
    except Exception as error:  # a user's function may do anything
        raise ValueError(
            f"its metric {name_of(metric)!r} fails: {' '.join(str(error).split()).rstrip('.')}"
        ) from error


def ask(engine: HFLM, requests: list[Instance]) -> list[Any]:
    """The engine's answer to each request; requests of one kind are asked together."""
    given: list[Any] = [None] * len(requests)
    for kind in dict.fromkeys(request.request_type for request in requests):
        places = [i for i, request in enumerate(requests) if request.request_type == kind]
        found = getattr(engine, kind)([requests[i] for i in places], disable_tqdm=True)
        for place, answer in zip(places, found, strict=True):
            given[place] = answer
    return given


# ------------------------------------------------------------------------------------------------ probes


def score(task: Task, responses: Responses, tokenizer: PreTrainedTokenizerBase) -> tuple[float, ...]:
    """1 or 0 for each item."""
    items = read(task)
    if task.kind == "multiple_choice":
        return tuple(_multiple_choice(item, answer, tokenizer) for item, answer in zip(items, responses, strict=True))
    if task.kind == "exact_match":
        return tuple(_exact_match(task, item, answer[0]) for item, answer in zip(items, responses, strict=True))
    if task.kind == "pass@1":
        return tuple(float(verdict.passed) for verdict in _verdicts(task, responses))
    raise AssertionError(task.kind)


def _verdicts(task: Task, responses: Responses) -> list[Verdict]:
    items = zip(read(task), responses, strict=True)
    return check_programs([(item["prompt"] + answer[0], item["tests"]) for item, answer in items])


def _multiple_choice(item: dict[str, Any], answers: list[Any], tokenizer: PreTrainedTokenizerBase) -> float:
    """Right where the right choice has the highest mean log-likelihood a token; ties go to the first choice."""
    prompt = len(tokenizer(item["prompt"])["input_ids"])
    lengths = [len(tokenizer(item["prompt"] + choice)["input_ids"]) - prompt for choice in item["choices"]]
    means = [likelihood / max(1, n) for (likelihood, _), n in zip(answers, lengths, strict=True)]
    return float(means.index(max(means)) == item["answer"])


def _exact_match(task: Task, item: dict[str, Any], text: str) -> float:
    """Right where what stands after the marker on the first line equals the target, white space aside."""
    line = text.partition("\n")[0]
    answer = line.rpartition(task.marker)[2] if task.marker and task.marker in line else line
    return float(answer.strip() == str(item["target"]).strip())
