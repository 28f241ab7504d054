# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli calibprune`: parse, call, show. Heavy libraries are imported only when a command runs."""

from __future__ import annotations

import json
import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import cli_compare, cli_study
from .cli_text import PROFILE_HEADER, PROFILE_LEGEND, plan_text, profile_row, source_row
from .records import ALLOCATIONS, CAPABILITIES, METHODS, SEQUENTIAL, CalibPruneConfig, CalibrationSource
from .terminal import BAD_ARGUMENTS, FAILED, errors, interrupts, progress, quiet_libraries, say, table


if TYPE_CHECKING:
    from .pruner import CalibPruner


BESIDE_WEIGHTS = 2**25  # bytes on disk for tokenizer, records and card
CONFIG_OPTIONS = [f.name for f in fields(CalibPruneConfig) if f.name not in ("model", "sources")]


# -------------------------------------------------------------------------------------------- arguments


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id, local folder, or 'pocket': the bundled small model")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--dtype", help="auto (the checkpoint's), bfloat16, float16 or float32")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:0, ...")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")


def _add_loading(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load weights that are pickles (.bin), where there are no others"
    )


def _add_calibration(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--mix",
        metavar="MIX",
        help="igsp (default): chosen from what the model writes, or from the sources; self-cal, sgs: written by the model; "
        "single:NAME, uniform, weighted:NAME=2,OTHER=1, cola, balanced, mixcal: text from the sources; with options as in "
        "igsp:temperature=0.8,oversample=4",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        metavar="SOURCE",
        help="names listed by 'calibprune sources', PATH (counts as general), NAME=PATH:CAPABILITY, or hub:ID for a "
        "published calibration set; for igsp also 'self': the model itself (its default)",
    )
    parser.add_argument("--samples", type=int, help="calibration samples (default 128; pocket: 64)")
    parser.add_argument("--length", type=int, help="tokens in a sample (default 2048; pocket: 256)")
    parser.add_argument("--seed", type=int, help="seed of the draw (default 0)")
    parser.add_argument("--seed-texts", metavar="FILE", help="JSON table of the short texts that the model continues")


def _add_evaluation(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--capabilities",
        help=f"auto (default: what can be measured here), none, or a list such as {','.join(CAPABILITIES[2:])}",
    )
    parser.add_argument("--perplexity-text", metavar="FILE", help="measure perplexity on this text, not on WikiText-2")


def _add_tasks(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        help="quick (default: a fixed draw of 200 items of each benchmark), full, or pocket (the pocket's default)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="benchmarks by name, such as hellaswag gsm8k, or FILE.yaml:CAPABILITY, a task of lm-eval; measured "
        "completely unless --suite or --limit says otherwise",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="items of each benchmark, drawn by a fixed seed")
    parser.add_argument(
        "--task-data", metavar="DIR", help="read the benchmarks from local files: DIR/hellaswag.jsonl, ..."
    )
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        default=None,
        help="run what the model writes for humaneval and mbpp, and for code probes if it is of the Hub, in a sandbox",
    )


def _pruner(arguments: Namespace, stream: bool | str = "auto") -> CalibPruner:
    """The pruner that the arguments describe; only what the user gave is passed on."""
    from .pruner import CalibPruner

    options = {name: getattr(arguments, name, None) for name in CONFIG_OPTIONS}
    return CalibPruner.from_pretrained(
        arguments.model,
        sources=getattr(arguments, "sources", None),
        perplexity_text=getattr(arguments, "perplexity_text", None),
        stream=stream,
        allow_pickle=arguments.allow_pickle,
        **{name: value for name, value in options.items() if value is not None},
    )


# --------------------------------------------------------------------------------------------- commands


class _Command(BaseOptimumCLICommand):
    """A command that can take long: every expected failure is one sentence, and an interrupt ends it."""

    def run(self) -> None:
        quiet_libraries()
        with errors(FAILED), interrupts() as check:
            self._run(check)

    def _run(self, check: Callable[[], None]) -> None:
        raise NotImplementedError


class PruneCommand(_Command):
    """Calibrate, prune, measure, save, and push if asked to."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_model(parser)
        _add_loading(parser)
        parser.add_argument(
            "--sparsity",
            help="60%%, 0.6, or n:m such as 2:4 (default 50%%); by names of modules, where the first pattern that fits "
            "counts: '*.mlp.*=70%%,*.o_proj=dense,*=50%%'",
        )
        parser.add_argument(
            "--allocation",
            help=f"{' or '.join(ALLOCATIONS)} (default {ALLOCATIONS[0]}); owl: blocks with more outliers lose less, the same in "
            "total; unstructured sparsities only",
        )
        _add_calibration(parser)
        _add_evaluation(parser)
        _add_tasks(parser)
        parser.add_argument("--method", help=f"{', '.join(METHODS)} (default {METHODS[0]})")
        parser.add_argument("--sequential", help=f"{', '.join(SEQUENTIAL)} (default {SEQUENTIAL[0]})")
        parser.add_argument(
            "--damping", type=float, help="share of the mean diagonal added to each Hessian (default 0.01)"
        )
        parser.add_argument(
            "--max-overlap",
            type=float,
            metavar="SHARE",
            help="of a task's items that may share 13 words in a row with the calibration text (default 0.01); text that the "
            "model writes is counted, not refused",
        )
        parser.add_argument("--micro-batch", type=int, help="samples whose arithmetic is done together")
        parser.add_argument(
            "--stream",
            choices=["auto", "always", "never"],
            default="auto",
            help="leave the blocks on disk and read each in its turn; auto (default): where the model does not fit into memory",
        )
        parser.add_argument(
            "--work-dir",
            metavar="DIR",
            help="keep each block there as soon as it is finished (default for a streamed model: OUTPUT.work); removed in the end",
        )
        parser.add_argument("--resume", action="store_true", help="go on with the run that stopped in the work folder")
        parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
        parser.add_argument("--push-to-hub", metavar="ID", help="upload the result to this repo")
        parser.add_argument("--private", action="store_true", default=None, help="create that repo as a private one")

    def _run(self, check: Callable[[], None]) -> None:
        arguments = self.args
        with errors(BAD_ARGUMENTS):
            from .publishing.card import not_measured, retention_table, starved_experts, upper_bound
            from .publishing.hub import check_output

            if os.environ.get("RANK", "0") == "0":  # of several processes, the one that saves
                check_output(arguments.output, arguments.overwrite)
            pruner = _pruner(arguments, stream=_stream(arguments))
            beside = f"{arguments.output}.work" if pruner.streamed or arguments.resume else None
            work_dir = arguments.work_dir or beside
            if work_dir is not None:
                _check_apart(arguments.output, work_dir)
            if pruner.speaks:
                size = pruner.model.get_memory_footprint(return_buffers=False)
                there = _size_of_shards(work_dir) if arguments.resume and work_dir is not None else 0
                check_output(arguments.output, arguments.overwrite, needed_bytes=size - there + BESIDE_WEIGHTS)
        kept = f"what is finished is in {work_dir}; go on with the same command and --resume"
        with errors(FAILED, *([kept] if work_dir is not None else [])):
            if not pruner.speaks:  # of several processes, one that helps
                pruner.prune(work_dir=work_dir, resume=arguments.resume)
                return
            say(plan_text(pruner.plan()), to_stderr=arguments.json)
            with progress(check) as show:
                record = pruner.prune(work_dir=work_dir, resume=arguments.resume, on_progress=show)
            pruner.save_pretrained(arguments.output, overwrite=arguments.overwrite, repo_id=arguments.push_to_hub)
            if work_dir is not None:
                getattr(os, "sync", lambda: None)()  # the result is on the disk before what it was made of goes
                shutil.rmtree(work_dir)
            if arguments.json:
                say(record.to_json().rstrip())
            else:
                say("\n" + table(retention_table(record)))
                for line in not_measured(record):
                    say(f"Not measured: {line}")
                if starved_experts(record):
                    say(f"Starved: {starved_experts(record)}")
                if upper_bound(record):
                    say(f"An upper bound: {upper_bound(record)} come from the generator of the probes.")
                say(f"\nSaved to {arguments.output} ({record.prune.zeros / record.prune.weights:.2%} zeros).")
        if arguments.push_to_hub:
            self._push()

    def _push(self) -> None:
        from .publishing.push import push_folder

        with errors(FAILED, f"the result is safe in {self.args.output}; 'calibprune push' finishes the upload"):
            commit = push_folder(self.args.output, self.args.push_to_hub, private=self.args.private)
            say(f"Pushed: {commit.commit_url}", to_stderr=self.args.json)


class PushCommand(_Command):
    """Upload a saved run, or finish an upload that was cut off."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("folder", metavar="DIR", help="folder that a run was saved to")
        parser.add_argument("repo_id", metavar="ID", help="repo to upload it to; a bare name belongs to you")
        parser.add_argument("--private", action="store_true", default=None, help="create that repo as a private one")
        parser.add_argument("--revision", help="branch to commit to, made where it does not exist")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
        parser.add_argument("--message", help="message of the commit")
        parser.add_argument(
            "--calibration",
            action="store_true",
            help="publish the calibration text, too, as the data set ID-calibration, where its licences allow it",
        )
        parser.add_argument(
            "--collection", action="store_true", help="add it to your collection of models pruned from the same base"
        )

    def _run(self, check: Callable[[], None]) -> None:
        arguments = self.args
        from .publishing.dataset import check_licences
        from .publishing.push import collect, finishing, push_calibration, push_folder, record_of

        with errors(FAILED, f"{arguments.folder} is as it was; the same command finishes the upload"):
            record = record_of(arguments.folder)
            if arguments.calibration:
                check_licences(record)
            options = {name: getattr(arguments, name) for name in ("private", "revision", "create_pr")}
            further = {name: getattr(arguments, name) for name in ("message", "calibration", "collection")}
            finish = finishing(arguments.folder, arguments.repo_id, **options, **further)
            commit = push_folder(
                arguments.folder, arguments.repo_id, commit_message=arguments.message, finish=finish, **options
            )
            say(f"Pushed: {commit.pr_url or commit.commit_url}")
            if arguments.calibration:
                name = f"{commit.repo_url.repo_id}-calibration"
                found = push_calibration(arguments.folder, name, finish=finish, **options)
                say(f"Pushed: {found.pr_url or found.commit_url}")
            if arguments.collection:
                say(f"Collected: {collect(commit.repo_url.repo_id, record.base.name, finish=finish)}")


class CardCommand(_Command):
    """Draw the card of a saved run again, from its record."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("name", metavar="DIR|ID", help="folder, or repo on the Hub, that a run was saved to")
        parser.add_argument("--revision", help="branch of the repo")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")

    def _run(self, check: Callable[[], None]) -> None:
        from .publishing.push import redraw

        say(redraw(self.args.name, revision=self.args.revision, create_pr=self.args.create_pr))


def _stream(arguments: Namespace) -> bool | str:
    """What was asked for; a run that is resumed does as it did, however much memory is free now."""
    asked = {"always": True, "never": False}.get(arguments.stream, "auto")
    manifest = Path(arguments.work_dir or f"{arguments.output}.work") / "manifest.json"
    if asked == "auto" and arguments.resume and manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))["identity"].get("streamed", "auto")
    return asked


def _check_apart(output: str, work_dir: str) -> None:
    out, work = Path(output).resolve(), Path(work_dir).resolve()
    if out == work or out in work.parents or work in out.parents:
        raise ValueError(f"--work-dir {work} and --output {out} must be apart: the work folder is removed in the end.")


def _size_of_shards(work_dir: str) -> int:
    """What is finished already and will be linked, not copied."""
    return sum(path.stat().st_size for path in Path(work_dir).glob("model-*.safetensors"))


class SourcesCommand(_Command):
    """List the calibration sources that have a name."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("--check", action="store_true", help="ask the Hub whether each of its sources can be used")

    def _run(self, check: Callable[[], None]) -> None:
        from . import pocket
        from .calibration.sources import SOURCES

        if self.args.check:
            self._check(list(SOURCES.values()), check)
            return
        header = ["name", "capability", "where", "licence"]
        rows = [header, *map(source_row, (*SOURCES.values(), *pocket.sources().values()))]
        say(table(rows))
        say("\nBundled sources belong to the model 'pocket'. Any other text: PATH, or NAME=PATH:CAPABILITY.")

    def _check(self, sources: list[CalibrationSource], check: Callable[[], None]) -> None:
        from .calibration.from_hub import check as check_source

        found = []
        with progress(check) as show:
            for done, source in enumerate(sources):
                show(done, len(sources), f"check: {source.name}")
                found.append(check_source(source))
        rows = [["name", "revision", "licence", "problem"]]
        for checked in found:
            source = checked.source
            rows.append([source.name, (source.revision or "")[:12], source.licence or "not stated", checked.problem])
        say(table(rows))
        bad = [checked.source.name for checked in found if checked.problem]
        if bad:
            raise ValueError(f"{len(bad)} of {len(found)} sources cannot be used: {', '.join(bad)}.")


class MixCommand(_Command):
    """Choose a calibration set and show it, without pruning."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_model(parser)
        _add_loading(parser)
        _add_calibration(parser)
        parser.add_argument("--output", metavar="DIR", help="write calibration.safetensors and mix.json there")

    def _run(self, check: Callable[[], None]) -> None:
        arguments = self.args
        with errors(BAD_ARGUMENTS):
            from .publishing.hub import check_output, save_calibration

            if arguments.output:
                check_output(arguments.output, overwrite=False)
            pruner = _pruner(arguments)
        with errors(FAILED):
            with progress(check) as show:
                choice = pruner.choose_calibration(on_progress=show)
            calibration, mix = choice.calibration, choice.mix
            if arguments.output:
                save_calibration(Path(arguments.output), calibration, mix)
            if arguments.json:
                say(mix.to_json().rstrip())
                return
            say(table([PROFILE_HEADER, *(profile_row(p, mix.shares.get(p.name, 0)) for p in choice.profiles)]))
            say(f"\n{PROFILE_LEGEND}")
            say(f"\n{len(calibration.rows)} samples, fingerprint {calibration.fingerprint[:16]}")
            if mix.objective is not None:
                say(f"J = {mix.objective:.4f} ({', '.join(f'{k} {v:.4f}' for k, v in mix.parts.items())})")


class EvaluateCommand(_Command):
    """Measure a model's capabilities and perplexity, without pruning."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_model(parser)
        _add_loading(parser)
        _add_evaluation(parser)
        _add_tasks(parser)

    def _run(self, check: Callable[[], None]) -> None:
        arguments = self.args
        with errors(BAD_ARGUMENTS):
            pruner = _pruner(arguments)
        with errors(FAILED):
            with progress(check) as show:
                scores = pruner.evaluate(on_progress=show)
                report = pruner.perplexity(on_progress=show)
            if arguments.json:
                found = {"scores": scores.to_dict(), "perplexity": report.to_dict() if report is not None else None}
                say(json.dumps(found, indent=1))
                return
            rows = [["capability", "task", "shots", "metric", "items", "chance", "score"]]
            for t in scores.tasks:
                numbers = [str(len(t.item_scores)), f"{100 * t.chance:.1f} %", f"{100 * t.value:.1f} %"]
                rows.append([t.capability, t.task, str(t.shots), t.metric, *numbers])
            if scores.tasks:
                say(table(rows))
            for name, reason in {**scores.not_measured, **scores.missing_tasks}.items():
                say(f"Not measured: {name}: {reason}")
            if report is not None:
                found = f"{report.dense:.3f}" if report.dense is not None else f"not measured ({report.reason})"
                say(f"\nPerplexity on {report.text}, windows of {report.length} tokens: {found}")


class StudyCommand(BaseOptimumCLICommand):
    """Prune with many mixes, and tabulate what each capability kept."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        _add_model(parser)
        cli_study.add_arguments(parser)
        _add_evaluation(parser)

    def run(self) -> None:
        quiet_libraries()
        with errors(FAILED, cli_study.KEPT), interrupts() as check:
            with errors(BAD_ARGUMENTS, cli_study.KEPT):
                study = cli_study.opened(self.args)
            data = cli_study.run(study, self.args, check, lambda line: say(line, to_stderr=True))
            say(json.dumps(data, indent=1) if self.args.json else table(cli_study.rows(data)))
            cli_study.check_failed(study)


class CompareCommand(BaseOptimumCLICommand):
    """Set two saved runs side by side."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        cli_compare.add_arguments(parser)

    def run(self) -> None:
        quiet_libraries()
        with errors(BAD_ARGUMENTS):
            cli_compare.run(self.args)


class CalibPruneCommand(BaseOptimumCLICommand):
    """The root of the subcommands."""

    COMMAND = CommandInfo(name="calibprune", help="Prune language models and measure what each capability kept.")
    SUBCOMMANDS = (
        CommandInfo(name="prune", help="Calibrate, prune, measure and save.", subcommand_class=PruneCommand),
        CommandInfo(name="push", help="Upload a saved run.", subcommand_class=PushCommand),
        CommandInfo(name="card", help="Draw a model card again.", subcommand_class=CardCommand),
        CommandInfo(name="sources", help="List calibration sources.", subcommand_class=SourcesCommand),
        CommandInfo(name="mix", help="Choose a calibration set and show it.", subcommand_class=MixCommand),
        CommandInfo(name="evaluate", help="Measure a model's capabilities.", subcommand_class=EvaluateCommand),
        CommandInfo(name="compare", help="Compare what two saved runs kept.", subcommand_class=CompareCommand),
        CommandInfo(name="study", help="Compare mixes over sparsities and seeds.", subcommand_class=StudyCommand),
    )
