# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as lm-eval's own task files define them, on data from the Hub or from local files."""

from __future__ import annotations

import ast
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.from_hub import sentence
from . import task_data
from .benchmarks import DRAW, Benchmark
from .contamination import WORD, WORDS
from .metrics import source_of
from .sandbox import check_programs


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase

EXAMPLES_SEED = 1234  # lm-eval's default, with which it draws the examples of a prompt
MATH = "it needs lm-eval's packages for mathematics: pip install 'optimum-calibprune[math]'"


@dataclass
class Loaded:
    """A benchmark with its data. `parts` are tasks of lm-eval, one or, of MMLU, one a subject; `data` says where the items
    are from; `drawn` names the indices of the items that are asked, by part. `settled` is False after scores in which a
    program ran out of wall-clock time, which depends on what else the machine does."""

    benchmark: Benchmark
    parts: list[ConfigurableTask]
    data: str
    settled: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def capability(self) -> str:
        return self.benchmark.capability

    @property
    def runs_code(self) -> bool:
        return self.benchmark.runs_code

    @property
    def writes(self) -> bool:
        """Whether each item is answered by one text, which a metric can compare with its reference."""
        return not self.runs_code and all(part.OUTPUT_TYPE == "generate_until" for part in self.parts)

    def references(self) -> list[Any]:
        return [part.doc_to_target(doc) for part in self.parts for doc in _items(part)]

    @property
    def shots(self) -> int:
        return self.parts[0].config.num_fewshot or 0

    def __post_init__(self) -> None:
        """Builds the requests, in the order of the items."""
        drawn = [(part, items) for part, items in zip(self.parts, self._draw(), strict=True) if items]
        for part, items in drawn:
            part.set_fewshot_seed(EXAMPLES_SEED)
            part.build_all_requests(samples=items if self.benchmark.limit is not None else None)
        self.parts = [part for part, _ in drawn]
        self.drawn = {part.config.task: items for part, items in drawn}

    def _draw(self) -> list[list[int]]:
        """The indices of each part's items: all, or as many as the limit allows, drawn by a fixed seed."""
        places = [(p, i) for p, part in enumerate(self.parts) for i in range(len(part.eval_docs))]
        limit = self.benchmark.limit
        if limit is not None and limit < len(places):
            places = sorted(random.Random(DRAW).sample(places, limit))
        return [[i for p, i in places if p == number] for number in range(len(self.parts))]

    def requests(self) -> list[Instance]:
        return [request for part in self.parts for request in part.instances]

    def items(self) -> int:
        return len({(request.task_name, request.doc_id) for request in self.requests()})

    def texts(self) -> list[str]:
        """What a calibration text would give away of each item; of code all that its row holds: task, program and tests."""
        return [
            "\n".join(_strings(doc)) if self.runs_code else _given_away(part, doc)
            for part in self.parts
            for doc in _items(part)
        ]

    def fingerprint(self) -> str:
        """SHA-256 over all that is asked and how it is scored, of a user's own task over its whole config and the files of
        its folder, too."""
        path = Path(self.benchmark.config)
        own = []
        if path.is_absolute():
            files = sorted(path.parent.glob("*.y*ml")) + sorted(path.parent.glob("*.py"))
            own = [file.read_text(encoding="utf-8") for file in files]
            own += [json.dumps(_described(part.config), sort_keys=True) for part in self.parts]
        return fingerprint(self.requests(), self.benchmark.metric, self.name, *own)

    def chance(self) -> float:
        """The score of guessing: of multiple choice the mean of one in as many choices as an item has."""
        kinds = [
            1 / len(part.doc_to_choice(doc)) if part.OUTPUT_TYPE == "multiple_choice" else 0.0
            for part in self.parts
            for doc in _items(part)
        ]
        return sum(kinds) / len(kinds)

    def scores(self, answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[float, ...]]:
        """The metric and the score of each item, from an answer to each of the requests.

        Raises `ValueError` where the task's scoring fails, or its metric is none that every item has for itself, in [0, 1].
        """
        for request in self.requests():
            request.resps.clear()
            request.filtered_resps.clear()
        for request, answer in zip(self.requests(), answers, strict=True):
            request.resps.append(answer)
        if self.runs_code:
            programs = [program for part in self.parts for program in _programs(part)]
            verdicts = check_programs(programs)
            self.settled = all(verdict.settled for verdict in verdicts)
            return "pass@1", tuple(float(verdict.passed) for verdict in verdicts)
        try:
            found = [(key, value) for part in self.parts for key, value in _results(part, self.benchmark.metric)]
        except Exception as error:  # a user's scoring may do anything
            raise ValueError(f"its scoring fails: {' '.join(repr(error).split())}") from error
        metric = found[0][0]
        values = [value for _, value in found]
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            raise ValueError(
                f"its metric {metric!r} gives {values[0]!r} for an item; only metrics that give each item a number from 0 to 1 "
                "can be compared item by item"
            )
        return metric, tuple(map(float, values))


def fingerprint(requests: Sequence[Instance], *scoring: str) -> str:
    """SHA-256 over requests with their items, and what is told of their scoring."""
    digest = hashlib.sha256(repr(scoring).encode())
    for request in requests:
        asked = [request.request_type, request.args, request.doc, request.repeats]
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _described(value: Any) -> Any:
    """What a config says, as JSON without addresses of objects: of a function its source. How data are loaded is left out:
    what was loaded stands in the requests."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _described(item) for key, item in value.items() if key != "dataset_kwargs"}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if callable(value):
        return source_of(value)
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__


def _items(part: ConfigurableTask) -> list[dict[str, Any]]:
    """The items of a part's requests, each once, in their order."""
    return list({request.doc_id: request.doc for request in part.instances}.values())


def _given_away(part: ConfigurableTask, doc: dict[str, Any]) -> str:
    """What is asked with the right answer, and the long texts of the item's row that are not in it."""
    choices = part.doc_to_choice(doc) if part.OUTPUT_TYPE == "multiple_choice" else []
    halves = (part.doc_to_text(doc), part.doc_to_target(doc))
    asked = " ".join(str(choices[half] if choices and isinstance(half, int) else half) for half in halves)
    return "\n".join(
        [asked, *(text for text in _strings(doc) if len(WORD.findall(text)) >= WORDS and text not in asked)]
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _results(part: ConfigurableTask, metric: str) -> list[tuple[str, float]]:
    """What lm-eval makes of the answers, item by item: the name of the metric and its value."""
    part.apply_filters()
    by_item: dict[int, list[Instance]] = defaultdict(list)
    for request in part.instances:
        by_item[request.doc_id].append(request)
    wanted, _, wanted_filter = metric.partition(",")
    results = []
    for requests in by_item.values():
        requests.sort(key=lambda request: request.idx)
        chosen = wanted_filter or next(iter(requests[0].filtered_resps))
        found = part.process_results(requests[0].doc, [request.filtered_resps[chosen] for request in requests])
        if not found:
            raise ValueError("it gives an item no metric")
        key = wanted or next(iter(found))
        value = found[key]
        results.append(
            (f"{key},{chosen}" if wanted_filter else key, value.item() if hasattr(value, "item") else value)
        )
    return results


def _programs(part: ConfigurableTask) -> list[tuple[str, str]]:
    """What the model wrote, after its beginning where the prompt is code, and the tests of the item."""
    texts = [request.resps[0] for request in part.instances]
    begun = part.config.task == "humaneval"
    return [
        (f"{doc['prompt'] if begun else ''}{text}", part.doc_to_target(doc))
        for doc, text in zip(_items(part), texts, strict=True)
    ]


# ----------------------------------------------------------------------------------------------- loading


def load(benchmark: Benchmark, token: str | None = None) -> Loaded:
    """A benchmark with its data, from its folder of local files or from the Hub.

    Raises `ValueError` with half a sentence that says why it cannot be had here, `ConnectionError` where the Hub cannot be
    reached.
    """
    own = Path(benchmark.config).is_absolute()
    try:
        configs = [_config(path, benchmark) for path in _files(benchmark.config)]
    except ModuleNotFoundError as error:
        raise ValueError(MATH if "minerva" in benchmark.config else f"it needs a package: {error}") from error
    except Exception as error:  # a user's file may hold anything
        if not own:
            raise
        raise ValueError(f"{Path(benchmark.config).name} is not a task of lm-eval: {_said(error)}") from error
    if benchmark.data is not None and not own:
        configs, data = _local(benchmark, configs, benchmark.data)
    else:
        data = (
            f"{configs[0].get('dataset_path')}, {configs[0].get('test_split') or configs[0].get('validation_split')}"
        )
        for config in configs if token else ():
            config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "token": token}
    try:
        parts = _tasks(configs)
        if any(part.OUTPUT_TYPE == "loglikelihood_rolling" for part in parts):
            raise ValueError("it has no score for each item but a perplexity; the option perplexity_text measures one")
        return Loaded(benchmark, parts, data)
    except AssertionError as error:  # lm-eval's word on a data set that does not do
        raise ValueError(f"lm-eval cannot ask it: {error}") from error


def _files(pattern: str) -> list[Path]:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    found = [Path(pattern)] if Path(pattern).is_absolute() else sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"lm-eval {version('lm_eval')} has no task file {pattern}; its version 0.4.13 has")
    return found


def _config(path: Path, benchmark: Benchmark) -> dict[str, Any]:
    """The task that a file of lm-eval describes; of one that runs code without what it would run it with."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=not benchmark.runs_code)
    if not isinstance(config.get("task"), str):
        raise ValueError("it describes no single task")
    config = {key: value for key, value in config.items() if key not in ("tag", "task_alias")}
    if config.get("repeats", 1) != 1:
        raise ValueError("it asks each question more than once, which is not done here")
    if config.get("unsafe_code") and not benchmark.runs_code:
        raise ValueError("it runs generated code outside of our sandbox")
    if benchmark.runs_code:
        for key in ("unsafe_code", "metric_list", "filter_list"):
            config.pop(key, None)
        examples = config.get("fewshot_config") or {}
        if isinstance(examples.get("samples"), str):
            config["fewshot_config"] = {**examples, "samples": _returned(examples["samples"])}
    if benchmark.shots is not None:
        config["num_fewshot"] = benchmark.shots
    return config


def _returned(function: str) -> Any:
    """What `FOLDER/MODULE.FUNCTION` of lm-eval returns. The module as a whole would load and try `code_eval`."""
    module, _, name = function.rpartition(".")
    tree = ast.parse(Path(f"{module}.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope: dict[str, Any] = {}
    exec(compile(tree, f"{module}.py", "exec"), scope)
    return scope[name]()


def _local(benchmark: Benchmark, configs: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The same tasks on local files. Where a prompt needs examples and there is no file of them, they come from the
    evaluated items without the one that is asked, which is what lm-eval does with a data set that has one split."""
    found = task_data.evaluated(benchmark.name, folder)
    if found is None:
        raise ValueError(f"there is no {benchmark.name}.jsonl among the local files")
    rows, data = found
    examples = task_data.examples(benchmark.name, folder)
    needed = bool(benchmark.shots) and not any("samples" in (config.get("fewshot_config") or {}) for config in configs)
    if needed:
        data += f", examples from {examples[1]}" if examples else ", examples from the same file"
    changed = []
    for config in configs:
        subject = config["dataset_name"] if len(configs) > 1 else None
        splits = {"test": [row for row in rows if subject in (None, row.get("subject"))]}
        if examples:
            splits["train"] = [row for row in examples[0] if subject in (None, row.get("subject"))]
        if splits["test"]:
            changed.append(config | _redirected(splits, needed))
    if not changed:
        raise ValueError(f"{data} has no item with a subject of {benchmark.name}")
    return changed, data


def _redirected(splits: dict[str, list[task_data.Row]], needed: bool) -> dict[str, Any]:
    from datasets import Dataset

    return {
        "custom_dataset": lambda **_: {name: Dataset.from_list(rows) for name, rows in splits.items()},
        "test_split": "test",
        "validation_split": None,
        "training_split": "train" if "train" in splits else None,
        "fewshot_split": ("train" if "train" in splits else "test") if needed else None,
        "dataset_kwargs": None,
        "metadata": {"version": 1.0},
    }


def _tasks(configs: list[dict[str, Any]]) -> list[ConfigurableTask]:
    import huggingface_hub
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    repo = configs[0].get("dataset_path")
    try:
        return list(TaskManager(include_defaults=False).load(configs)["tasks"].values())
    except (OSError, DatasetsError) as error:
        if "/" not in str(repo):  # a user's own files
            raise ValueError(f"{repo} cannot be had here: {_said(error)}") from error
        if huggingface_hub.is_offline_mode():
            raise ValueError(f"{repo} cannot be had here (HF_HUB_OFFLINE is set)") from error
        kind = ConnectionError if isinstance(error, ConnectionError | TimeoutError) else ValueError
        raise kind(f"{repo} cannot be had here: {_said(error)}") from error
    except Exception as error:  # lm-eval tells of a task and data that do not fit by any exception there is
        if isinstance(error, StopIteration) or "out of bounds for size 0" in str(error):
            raise ValueError("it has no items") from error
        raise ValueError(f"lm-eval cannot read it: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """For the middle of a sentence."""
    return sentence(error).rstrip(".")
