# SPDX-License-Identifier: Apache-2.0
"""Train a Llama of any size on the token files of prepare.py, with Muon and AdamW, on a CPU or one GPU.

    python examples/pocket/train.py --corpus DIR --output MODEL [--preset pocket|50m|160m] [--minutes 10 | --tokens 24000000]

Writes an ordinary transformers checkpoint with its tokenizer. A run that was stopped goes on when the same command is given
again. Needs torch, numpy and transformers alone.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from training import corpus as corpora
from training.run import Settings, held_out_losses, train
from training.schedule import Budget
from training.shape import CONTEXT, PRESETS, Shape
from transformers import AutoTokenizer


logger = logging.getLogger("train")

STATE = "training.pt"  # in the output folder, until the model is saved


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of prepare.py")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the model, and for the state of the run"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="pocket", help="a shape and its defaults (default: pocket)"
    )
    for name in asdict(PRESETS["pocket"].shape):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the preset's")
    parser.add_argument("--tokens", type=int, help="train on so many tokens")
    parser.add_argument("--minutes", type=float, help="train so long; with --tokens: whichever ends first")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--micro-batch", type=int, help="sequences on the device at once")
    parser.add_argument("--warmup", type=int, default=Settings.warmup, help="steps of warm-up")
    parser.add_argument(
        "--muon-rate", type=float, default=Settings.muon_rate, help="peak learning rate of the matrices"
    )
    parser.add_argument(
        "--adamw-rate",
        type=float,
        default=Settings.adamw_rate,
        help="of the rest, at hidden 192; it shrinks with width",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (CUDA; costs about a minute)")
    parser.add_argument("--log-every", type=int, default=25, help="steps between two lines of the log")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two states on disk")
    return parser.parse_args(given)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """The preset, and what was given instead. Minutes alone replace the preset's number of tokens."""
    preset = PRESETS[chosen.preset]
    shape = {
        name: value if (value := getattr(chosen, name)) is not None else default
        for name, default in asdict(preset.shape).items()
    }
    tokens = preset.tokens if chosen.tokens is None and chosen.minutes is None else chosen.tokens
    batch = preset.batch if chosen.batch is None else chosen.batch
    return Settings(
        shape=Shape(**shape),
        budget=Budget(tokens, chosen.minutes),
        length=preset.length if chosen.length is None else chosen.length,
        batch=batch,
        micro_batch=min(batch, preset.micro_batch) if chosen.micro_batch is None else chosen.micro_batch,
        seed=chosen.seed,
        warmup=chosen.warmup,
        muon_rate=chosen.muon_rate,
        adamw_rate=chosen.adamw_rate,
    )


def run(chosen: argparse.Namespace) -> None:
    """Trains, saves the model, and only then removes the state of the run."""
    settings, state = settings_of(chosen), chosen.output / STATE
    if (chosen.output / "config.json").is_file() and not state.is_file():
        raise ValueError(f"{chosen.output} holds a finished model already; choose another --output.")
    corpus = corpora.load(chosen.corpus)
    chosen.output.mkdir(parents=True, exist_ok=True)
    logger.info("%.1f million parameters, %s", settings.shape.parameters(corpus.vocabulary) / 1e6, settings.budget)
    options = {"compiled": chosen.compile, "log_every": chosen.log_every, "save_every": chosen.save_every}
    model = train(corpus, settings, state, torch.device(chosen.device), **options)
    for name, loss in held_out_losses(model, corpus, settings.length, settings.micro_batch).items():
        logger.info("held out: %s %.3f", name, loss)
    model.to(torch.bfloat16).save_pretrained(chosen.output)
    tokenizer = AutoTokenizer.from_pretrained(corpus.folder / corpora.TOKENIZER)
    tokenizer.model_max_length = max(CONTEXT, settings.length)
    tokenizer.save_pretrained(chosen.output)
    state.unlink(missing_ok=True)
    logger.info("saved to %s", chosen.output)


def main(given: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        run(arguments_of(given))
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
