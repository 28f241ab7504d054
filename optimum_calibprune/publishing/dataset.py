# SPDX-License-Identifier: Apache-2.0
"""A saved run's calibration set as a data set of its own, where the licence of every source allows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import CAPABILITIES, CalibrationSource, RunRecord, unknown
from ..values import ANY, HUB
from .hub import CALIBRATION_NAME, UNREADABLE, record_of
from .markup import code, fenced, is_repo_id, link, one_line, prose
from .readme import BEGIN, END


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a licence begins with that lets its text be passed on; never with a part that forbids changes or commerce.
ALLOWING = ("afl", "apache", "bsd", "cc-by", "cc0", "isc", "mit", "odbl", "odc-by", "pddl", "unlicense")
FORBIDDING = ("nc", "nd")
METRICS = ("perplexity", "duplicate_rate", "collision_probability", "type_token_ratio", "unigram_entropy")
METRICS += ("compression_ratio", "model_entropy")


def check_licences(run: RunRecord) -> None:
    """Raises `ValueError` that names every source whose licence is not known to let its text be passed on."""
    refused = [source for source in used_sources(run) if not _allows(source)]
    if refused:
        named = "; ".join(f"{source.name}: {source.licence or 'not stated'}" for source in refused)
        raise ValueError(
            f"The calibration set cannot be published, since these licences are not known to allow it: {named}. Leave "
            "push_calibration out, or state a licence that you know with CalibrationSource(..., licence=...)."
        )


def used_sources(run: RunRecord) -> list[CalibrationSource]:
    origins = {row.origin for row in run.rows}
    return [source for source in run.sources if source.name in origins]


def _allows(source: CalibrationSource) -> bool:
    if source.written:
        return True
    licence = _identifier(source.licence)
    return licence.startswith(ALLOWING) and not set(licence.split("-")) & set(FORBIDDING)


def _identifier(licence: str | None) -> str:
    """A licence as the Hub writes it: `CC BY-SA 3.0` is `cc-by-sa-3.0`."""
    return "-".join(one_line(licence or "").lower().split())


def save_dataset(run_folder: str | Path, target: str | Path, repo_id: str) -> Path:
    """Writes the calibration set of a saved run to the new folder `target`: a file a capability, and a card.

    Each row has the text of a sample, where it is from, its licence and its metrics. Documents in a sample are set apart by a
    blank line. `repo_id` is where the data set will live. Raises `ValueError` where a licence does not allow it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    run_folder, target = Path(run_folder), Path(target)
    run = record_of(run_folder)
    check_licences(run)
    for row in run.rows:  # a record may come from elsewhere, and its groups become names of files
        if row.group not in (*CAPABILITIES, ANY):
            raise unknown("capability of a row", row.group, (*CAPABILITIES, ANY))
    tokenizer = AutoTokenizer.from_pretrained(run_folder, trust_remote_code=False)
    try:
        ids = load_file(run_folder / CALIBRATION_NAME)["input_ids"]
        rows = [_row(run, i, ids[i].tolist(), tokenizer) for i in range(len(run.rows))]
    except (*UNREADABLE, SafetensorError) as error:
        raise ValueError(
            f"{CALIBRATION_NAME} and the record of {run_folder} do not fit each other: {type(error).__name__}: {error}"
        ) from error
    (target / "data").mkdir(parents=True)
    for group in sorted({row["capability"] for row in rows}):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["capability"] == group]
        (target / "data" / f"{group}.jsonl").write_text("".join(lines), encoding="utf-8")
    (target / "README.md").write_text(render_dataset(run, repo_id), encoding="utf-8")
    return target


def _row(run: RunRecord, index: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    row, profile = run.rows[index], run.samples[index]
    (source,) = (source for source in run.sources if source.name == row.origin)
    return {
        "text": _text(ids, tokenizer),
        "source": source.name,
        "capability": row.group,
        "repo": source.repo,
        "subset": source.subset,
        "revision": source.revision,
        "written": source.written or None,
        "index": row.index,
        "licence": source.licence,
        "tokens": len(ids),
        **{name: getattr(profile, name) for name in METRICS},
    }


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The documents of a sample, which the end-of-sequence token sets apart there."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eos_token_id:
            documents.append([])
        else:
            documents[-1].append(token)
    texts = [tokenizer.decode(document, clean_up_tokenization_spaces=False) for document in documents if document]
    return "\n\n".join(texts)


def render_dataset(run: RunRecord, repo_id: str) -> str:
    """The data set's card, a pure function of the record."""
    from huggingface_hub import DatasetCardData

    groups: dict[str, int] = {}
    for row in run.rows:
        groups[row.group] = groups.get(row.group, 0) + 1
    groups = dict(sorted(groups.items()))
    sources = used_sources(run)
    licences = {_identifier(source.licence) for source in sources if source.licence and not source.written}
    if any(source.written for source in sources) and run.base.licence:
        licences.add(_identifier(run.base.licence))
    data = DatasetCardData(
        license=sorted(licences) or None,
        language=[one_line(language) for language in run.base.language] or None,
        tags=["calibprune", "calibration", "pruning"],
        source_datasets=sorted({s.repo for s in sources if s.repo and is_repo_id(s.repo)}) or None,
        configs=[
            {"config_name": group, "data_files": [{"split": "train", "path": f"data/{group}.jsonl"}]}
            for group in groups
        ],
    )
    short = repo_id.rpartition("/")[2]
    weights = ",".join(f"{short}-{group}={count}" for group, count in groups.items())
    mix = f"single:{short}-{next(iter(groups))}" if len(groups) == 1 else f"weighted:{weights}"
    again = (
        "from optimum_calibprune import CalibPruner\n\n"
        f"pruner = CalibPruner.from_pretrained(\n    {json.dumps(one_line(run.base.name))},\n"
        f"    sources=[{json.dumps(HUB + one_line(repo_id))}],\n    mix={json.dumps(mix)},\n"
        f"    samples={len(run.rows)},\n    length={run.plan.length},\n)"
    )
    base = link(run.base.name, revision=run.base.revision) if run.base.revision else code(run.base.name)
    lines = [
        f"---\n{data}\n---\n\n{BEGIN}\n",
        f"# Calibration text for {prose(run.base.name)}\n",
        f"{len(run.rows)} samples of {run.plan.length} tokens of {base}, chosen by the mix {code(run.config.mix)} with seed "
        f"{run.config.seed}.\n",
        "| source | capability | samples | data | licence |",
        "|---|---|---|---|---|",
        *[_source_line(run, source) for source in sources],
        "\nEach row holds the text of a sample, its source and that source's commit, the licence, and the sample's metrics: "
        "perplexity under the",
        "dense model, 4-gram duplicates and collisions, type-token ratio, unigram entropy (bits a token), compression ratio, "
        "entropy of the model (nats a token).",
        "Samples are cut from documents, so that most begin and end in the middle of one.\n",
        "## How to use it again\n",
        fenced(again, "python"),
        "\nText that is tokenised anew may give other tokens: the exact ids stand beside the pruned model.\n",
        END,
    ]
    return "\n".join(lines) + "\n"


def _source_line(run: RunRecord, source: CalibrationSource) -> str:
    count = sum(row.origin == source.name for row in run.rows)
    where = (
        "written by the model"
        if source.written
        else link(source.repo, "datasets/", source.revision)
        if source.repo
        else ""
    )
    licence = source.licence or ("the model's own text" if source.written else "")
    return f"| {code(source.name)} | {prose(source.capability)} | {count} | {where or 'a local file'} | {prose(licence)} |"
