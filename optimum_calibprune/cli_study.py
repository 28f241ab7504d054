# SPDX-License-Identifier: Apache-2.0
"""What `calibprune study` asks for, starts and says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .study.cells import CellResult
    from .study.runner import Study

KEPT = "finished cells are kept, and the same command goes on with the others"
OPTIONS = (
    *("sources", "probes", "perplexity_text", "capabilities", "revision", "dtype", "device", "samples", "length"),
    *("method", "seed_texts"),
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder, new or of this study: it then goes on")
    parser.add_argument(
        "--mixes",
        nargs="+",
        default=["all"],
        metavar="MIX",
        help="as --mix of 'calibprune prune'; 'single': each source alone; 'all' (default): those and one mix of each other "
        "kind; MIX@NAME,NAME is given these sources only, MIX@all all of them",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        metavar="SOURCE",
        help="names listed by 'calibprune sources', PATH (counts as general), or NAME=PATH:CAPABILITY",
    )
    parser.add_argument("--sparsity", nargs="+", default=["50%"], metavar="S", help="one or more (default 50%%)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of each calibration set (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="of these draws (default 0)")
    parser.add_argument("--samples", type=int, help="calibration samples (default 128; pocket: 64)")
    parser.add_argument("--length", type=int, help="tokens in a sample (default 2048; pocket: 256)")
    parser.add_argument("--method", help="as for 'calibprune prune'")
    parser.add_argument("--seed-texts", metavar="FILE", help="JSON table of the short texts that the model continues")
    parser.add_argument(
        "--probes", metavar="DIR", help="other probes for the pocket: general.jsonl, commonsense.jsonl, ..."
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that run cells (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each of them (default 1)")


def opened(arguments: Namespace) -> Study:
    """The study that the arguments describe, with everything checked."""
    from .study.runner import Study

    options = {name: getattr(arguments, name) for name in OPTIONS}
    return Study.open(
        arguments.model,
        arguments.output,
        mixes=arguments.mixes,
        sparsity=arguments.sparsity,
        seeds=range(arguments.first_seed, arguments.first_seed + arguments.seeds),
        **{name: value for name, value in options.items() if value is not None},
    )


def run(study: Study, arguments: Namespace, check: Callable[[], None], tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs the study, telling of each cell, and writes its report; `check` raises where the user has interrupted."""
    from .publishing import plots
    from .study.report import REPORT_NAME, write_report

    def on_cell(done: int, total: int, result: CellResult) -> None:
        check()
        seconds = f"{result.seconds.get('all', 0):.1f} s"
        tell(f"{done}/{total} {result.cell}: {f'failed: {result.failed}' if result.failed else seconds}")

    study.run(workers=arguments.workers, threads=arguments.threads, on_cell=on_cell)
    data = write_report(study.folder, study.settings)
    if not plots.available():
        tell(plots.MISSING)
    tell(f"The report is {study.folder.path / REPORT_NAME}.")
    return data


def rows(data: dict[str, Any]) -> list[list[str]]:
    """What was kept, as rows of cells for a terminal, the best first: per cent, or perplexity where nothing else is known."""
    from .study.figures import label

    kept = list(data["dense"]["scores"])
    header = [
        "calibration",
        "sparsity",
        "draws",
        *kept,
        *(["total", "95 % interval"] if kept else ["sparse perplexity"]),
    ]
    found = sorted(data["mixes"], key=lambda row: (-(row["total"] or 0), (row["perplexity"] or {}).get("mean", 0)))
    lines = []
    for row in found:
        values = [_percent(row["retention"][name]["value"]) for name in kept]
        if kept:
            values += [_percent(row["total"]), " to ".join(map(_percent, row["total_interval"] or ()))]
        else:
            values += [f"{row['perplexity']['mean']:.2f}" if row["perplexity"] else "not measured"]
        lines.append([label(row), row["pattern"], str(len(row["seeds"])), *values])
    return [header, *lines]


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def check_failed(study: Study) -> None:
    """Raises `ValueError` that names the cells that failed, where any did."""
    failed = study.failed()
    if failed:
        named = "; ".join(f"{result.cell}: {result.failed}" for result in failed)
        raise ValueError(
            f"{len(failed)} of {len(study.cells)} cells failed, and the same command tries them again. {named}"
        )
