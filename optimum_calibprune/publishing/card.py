# SPDX-License-Identifier: Apache-2.0
"""A RunRecord in, the text of its model card out; nothing is read but the template, nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..records import LEFT_DENSE, CalibrationSource, LayerReport, RunRecord, TaskOverlap, TaskRetention
from .markup import code, fenced, is_repo_id, link, literal, one_line, prose
from .readme import BEGIN, END


_HERE = Path(__file__).parent
PICTURES = ("figures/retention-light.png", "figures/tasks-light.png")  # those of a saved run that a card shows
NO_BREAK = "\u00a0"
MOST_NAMES = 10  # of a list in running text
PACKAGE = "optimum-calibprune"
METHOD_NAMES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "magnitude pruning"}
CITATIONS = {
    "sparsegpt": """\
@inproceedings{frantar2023sparsegpt,
  title = {{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author = {Frantar, Elias and Alistarh, Dan},
  booktitle = {International Conference on Machine Learning},
  year = {2023},
  note = {arXiv:2301.00774},
}""",
    "wanda": """\
@inproceedings{sun2024wanda,
  title = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2306.11695},
}""",
}


def template_path() -> Path:
    """The template: inside the package in a wheel, at the root of the repository in a checkout."""
    packaged = _HERE / "model_card_template.md"
    return packaged if packaged.exists() else _HERE.parents[1] / "model_card_template.md"


def render(run: RunRecord, repo_id: str | None = None, pictures: Sequence[str] = ()) -> str:
    """The card as Markdown with its metadata, the same text for the same record.

    Args:
        repo_id: where the model will live, if that is known.
        pictures: files beside the card; those of `PICTURES` that are among them are shown.
    """
    values = {
        "begin": BEGIN,
        "end": END,
        "title": prose(title(run)),
        "base_link": link(run.base.name) if run.base.revision is not None else code(run.base.name),
        "load_id": literal(repo_id or "path/to/this/folder"),
        "method": METHOD_NAMES[run.prune.method],
        "run": run,
        "mix": code(run.config.mix),
        "sparsity": _sparsity(run),
        "asked": code(run.config.sparsity),
        "by_module": run.config.sparsity.by_module,
        "owl": _owl(run),
        "loss": _loss(run),
        "capabilities": _capability_rows(run),
        "tasks": _task_rows(run),
        "total": _total(run),
        "pictures": [name for name in PICTURES if name in pictures],
        "overlaps": [_overlap_row(run, entry) for entry in run.overlaps],
        "not_measured": [(prose(name), prose(why)) for name, why in _not_measured(run)],
        "perplexity": _perplexity(run),
        "command": fenced(run.command, "bash"),
        "sources": [_source_row(run, source) for source in run.sources if source.name in run.mix.shares],
        "note": prose(run.mix.note),
        "fingerprint": code(run.fingerprint[:16]),
        "upper_bound": ", ".join(map(code, filter(None, upper_bound(run).split(", ")))),
        "zeros": f"{run.prune.zeros:,}",
        "weights": f"{run.prune.weights:,}",
        "share": _percent(run.prune.zeros / run.prune.weights, 2),
        "rescues": _listed(
            [f"{code(layer.module)} ({prose(layer.rescue)})" for layer in run.prune.layers if layer.rescue], "; "
        ),
        "starved": starved_experts(run, code),
        "layers": _layer_rows(run.prune.layers),
        "untouched": [(code(entry.name), prose(entry.reason)) for entry in run.prune.untouched],
        "hardware": ", ".join(f"{prose(key)} {prose(value)}" for key, value in run.hardware.items()),
        "stages": [(prose(stage), f"{seconds:.1f}") for stage, seconds in run.seconds.items()],
        "peak": f"{run.peak_memory / 2**30:.2f} GiB",
        "versions": ", ".join(f"{prose(name)} {prose(version)}" for name, version in run.versions.items()),
        "citation": fenced(CITATIONS[run.prune.method], "bibtex") if run.prune.method in CITATIONS else "",
        "release": prose(run.versions.get(PACKAGE, "")),
    }
    card = ModelCard.from_template(_metadata(run), template_path=str(template_path()), **values)
    return str(card).rstrip() + "\n"


def upper_bound(run: RunRecord) -> str:
    """Names of the sources that were used and come from the generator of the probes; empty where there is none."""
    return ", ".join(s.name for s in run.sources if s.upper_bound and s.name in run.mix.shares)


def starved_experts(run: RunRecord, written: Callable[[str], str] = str) -> str:
    """How many experts had too few tokens, and which, each name as `written` has it; empty where none had."""
    experts = run.prune.experts
    starved = [name for name, is_starved in experts.items() if is_starved]
    if not starved:
        return ""
    return (
        f"{len(starved):,} of {len(experts):,} experts were sent too few tokens for one of their matrices, which was pruned "
        f"for all tokens of its layer: {_listed([written(name) for name in starved], ', ')}."
    )


def _listed(names: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return separator.join(names[:MOST_NAMES]) + more


def _layer_rows(layers: Sequence[LayerReport]) -> list[dict[str, str]]:
    """A row for each module; the experts of a layer share one, since there may be thousands."""
    rows: dict[str, list[LayerReport]] = {}
    for layer in layers:
        rows.setdefault(layer.module if layer.routed is None else _of_all_experts(layer.module), []).append(layer)
    return [_layer_row(name, several) for name, several in rows.items()]


def _of_all_experts(module: str) -> str:
    experts, _, kind = module.rsplit(".", 2)
    return f"{experts}.*.{kind}"


def _layer_row(name: str, layers: Sequence[LayerReport]) -> dict[str, str]:
    errors = [layer.relative_error for layer in layers]
    why = layers[0].why if len(layers) == 1 else ""
    worst = f" (at most {max(errors):.4f})" if len(layers) > 1 else ""
    return {
        "module": f"{code(name)}, {len(layers)} experts" if layers[0].routed is not None else code(name),
        "shape": f"{layers[0].shape[0]} x {layers[0].shape[1]}",
        "zeros": f"{sum(layer.zeros_found for layer in layers)}{f' ({prose(why)})' if why else ''}",
        "asked": str(sum(layer.zeros_asked for layer in layers)),
        "error": f"{sum(errors) / len(errors):.4f}{worst}",
    }


def title(run: RunRecord) -> str:
    return f"{run.base.name} at {_sparsity(run)}"


def _sparsity(run: RunRecord) -> str:
    """The sparsity as it was asked; where modules differ, the share that this is of all linear layers of the blocks."""
    if not run.config.sparsity.by_module:
        return str(run.config.sparsity)
    left = sum(math.prod(entry.shape) for entry in run.prune.untouched if entry.reason.startswith(LEFT_DENSE))
    return f"{sum(layer.zeros_asked for layer in run.prune.layers) / (run.prune.weights + left):.1%}"


def _owl(run: RunRecord) -> str:
    """What outlier-weighted allocation gave the modules; empty where it was not asked for."""
    if run.config.allocation != "owl":
        return ""
    shares = [layer.zeros_asked / math.prod(layer.shape) for layer in run.prune.layers]
    return (
        f"Blocks with more outliers lose less (OWL, arXiv:2310.05175): of a matrix {_percent(min(shares))} to "
        f"{_percent(max(shares))} were asked, in total as many as without it."
    )


def _metadata(run: RunRecord) -> ModelCardData:
    from_hub = [s for s in run.sources if is_repo_id(s.repo) and s.name in run.mix.shares]
    return ModelCardData(
        base_model=run.base.name if run.base.revision is not None and is_repo_id(run.base.name) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=one_line(run.base.licence) if run.base.licence else None,
        language=[one_line(language) for language in run.base.language] or None,
        tags=["calibprune", "pruned", "sparse", run.prune.method],
        datasets=sorted({str(source.repo) for source in from_hub}) or None,
        calibprune={"calibration": [_at_revision(source) for source in from_hub]} if from_hub else None,
        model_name=one_line(title(run)),
        eval_results=_eval_results(run) or None,
    )


def _at_revision(source: CalibrationSource) -> dict[str, str]:
    """Which text of a data set it is, in the words that the Hub has for those of evaluation."""
    stated = {"dataset": source.repo, "config": source.subset, "split": source.split, "revision": source.revision}
    return {key: one_line(value) for key, value in stated.items() if value}


def _eval_results(run: RunRecord) -> list[EvalResult]:
    """One result a task of the pruned model, else one a capability; the base model's own results never. Tasks of one data
    set stand below it together, so that each result says itself what it is."""
    if run.tasks:
        return [
            _eval_result(
                task.repo if is_repo_id(task.repo) else f"calibprune/{task.task}",
                task.repo or task.task,
                f"{task.task} ({task.items} items{f', {task.shots} shots' if task.data else ''})",
                task.metric,
                task.sparse,
            )
            for task in run.tasks
        ]
    rows = run.capabilities.capabilities if run.capabilities else ()
    return [
        _eval_result(
            f"calibprune/{row.capability}",
            row.capability,
            f"{row.capability} ({row.items} items)",
            "accuracy",
            row.sparse,
        )
        for row in rows
    ]


def _eval_result(dataset: str, dataset_name: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=one_line(dataset),
        dataset_name=one_line(dataset_name),
        metric_name=one_line(name),
        metric_type=one_line(metric),
        metric_value=round(value, 4),
    )


def _loss(run: RunRecord) -> str:
    report = run.capabilities
    if report is None or report.total is None:
        return ""
    worst = next(c for c in report.capabilities if c.capability == report.worst)
    return (
        f"It keeps {_percent(report.total)} of its capabilities on average over {prose(', '.join(report.measured))}; the most "
        f"is lost in {prose(worst.capability)}, of which it keeps {_percent(worst.retention)}."
    )


def _capability_rows(run: RunRecord) -> list[dict[str, str]]:
    report = run.capabilities
    return [
        {
            "name": f"**{prose(row.capability)}** (worst)"
            if report and row.capability == report.worst
            else prose(row.capability),
            "count": str(row.items),
            "dense": _unbroken(_percent(row.dense)),
            "sparse": _unbroken(_percent(row.sparse)),
            "retention": _unbroken(_percent(row.retention)) or "undefined: dense is at chance",
            "interval": _unbroken(_range(row.interval)),
            "above": _unbroken(_percent(row.above_chance)),
        }
        for row in (report.capabilities if report else ())
    ]


def _task_rows(run: RunRecord) -> list[dict[str, str]]:
    return [
        {
            "name": code(task.task),
            "capability": prose(task.capability),
            "metric": prose(task.metric),
            "shots": str(task.shots) if task.data else "",
            "dense": _number(task.dense),
            "sparse": _number(task.sparse),
            "retention": _task_retention(task),
            "data": f"{task.items} of {_task_data(task)}" if task.data else str(task.items),
        }
        for task in run.tasks
    ]


def _task_retention(task: TaskRetention) -> str:
    """In per cent with its interval; empty in records that do not hold it."""
    if task.retention is None:
        return "at chance" if task.data else ""
    ends = f" ({_number(task.interval[0])} to {_number(task.interval[1])})" if task.interval is not None else ""
    return _number(task.retention) + ends


def _task_data(task: TaskRetention) -> str:
    """Where the items are from: the data set as a link, with the split; else the file."""
    linked = is_repo_id(task.repo) and task.data.startswith(task.repo)
    return link(task.repo, "datasets/") + prose(task.data.removeprefix(task.repo)) if linked else prose(task.data)


def _not_measured(run: RunRecord) -> list[tuple[str, str]]:
    """What could not be measured, with the reason."""
    found = sorted(run.capabilities.not_measured.items()) if run.capabilities else []
    text = run.perplexity
    return found + ([(f"perplexity, {text.text}", text.reason)] if text is not None and text.reason else [])


def _perplexity(run: RunRecord) -> dict[str, str] | None:
    report = run.perplexity
    if report is None or report.dense is None or report.sparse is None:
        return None
    return {
        "text": prose(report.text),
        "length": str(report.length),
        "dense": f"{report.dense:.2f}",
        "sparse": f"{report.sparse:.2f}",
    }


def _total(run: RunRecord) -> dict[str, str] | None:
    report = run.capabilities
    if report is None or report.total is None:
        return None
    return {
        "over": prose(", ".join(report.measured)),
        "retention": _unbroken(_percent(report.total)),
        "interval": _unbroken(_range(report.total_interval)),
    }


def _source_row(run: RunRecord, source: CalibrationSource) -> dict[str, str]:
    profile = next(profile for profile in run.profiles if profile.name == source.name)
    return {
        "name": code(source.name),
        "capability": source.capability,
        "share": _unbroken(_percent(run.mix.shares[source.name])),
        "data": _data(source),
        "licence": prose(source.licence or _unstated_licence(source)),
        "perplexity": f"{profile.perplexity:.1f}",
        "duplicates": _unbroken(_percent(profile.duplicate_rate)),
    }


def _overlap_row(run: RunRecord, entry: TaskOverlap) -> dict[str, str]:
    written = {source.name for source in run.sources if source.written}
    bound = {source.name for source in run.sources if source.upper_bound}
    why = {name: " (written by the model)" if name in written else " (upper bound)" for name in written | bound}
    return {
        "task": code(entry.task),
        "count": str(entry.items),
        "overlapping": f"{entry.overlapping} ({_percent(entry.overlapping / entry.items)})",
        "short": str(entry.short),
        "sources": ", ".join(f"{code(name)} {count}{why.get(name, '')}" for name, count in entry.sources.items()),
    }


def _data(source: CalibrationSource) -> str:
    """Where the text is from, with its commit; of text that the model wrote itself how it was drawn."""
    if source.written:
        how = ", ".join(
            f"{name} {source.pool[name]}" for name in ("prefixes of", "documents", "seed") if name in source.pool
        )
        return prose(f"written by the model: {', '.join(filter(None, (source.pool.get('sampling'), how)))}")
    if source.repo is None:
        return code(source.path) if source.path else "given in memory"
    at = f" at {code(source.revision[:12])}" if source.revision else ""
    subset = f" {prose(source.subset)}" if source.subset else ""
    return link(source.repo, "datasets/", source.revision) + subset + at


def _unstated_licence(source: CalibrationSource) -> str:
    return "the model's own text" if source.written else "see the data set's card" if source.repo else "not stated"


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _number(share: float) -> str:
    """In per cent, for a column that says so in its heading."""
    return f"{100 * share:.1f}"


def _unbroken(text: str) -> str:
    """As it stands in a narrow cell, without a line break inside."""
    return text.replace(" ", NO_BREAK)


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def retention_table(run: RunRecord) -> list[list[str]]:
    """What was kept, as rows of cells for a terminal: a header, the capabilities, the total, the perplexity."""
    rows = [["capability", "dense", "sparse", "retention", "95 % interval"]]
    for row in _capability_rows(run):
        rows.append([row["name"].replace("*", ""), row["dense"], row["sparse"], row["retention"], row["interval"]])
    total = _total(run)
    if total is not None:
        rows.append([f"total ({total['over']})", "", "", total["retention"], total["interval"]])
    text = run.perplexity
    if text is not None and text.dense is not None and text.sparse is not None:
        rows.append([f"perplexity, {text.text}", f"{text.dense:.2f}", f"{text.sparse:.2f}", "", ""])
    return [[cell.replace(NO_BREAK, " ") for cell in row] for row in rows]


def not_measured(run: RunRecord) -> list[str]:
    """What could not be measured, with the reason, a line each."""
    return [f"{name}: {why}" for name, why in _not_measured(run)]
