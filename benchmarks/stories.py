# SPDX-License-Identifier: Apache-2.0
"""What pruning costs a trained model from outside: stories260K, calibrated on one half of its text, scored on the other.

    python benchmarks/stories.py FOLDER     # with the model, its tokenizer and tinystories_sample.txt

Each story and each window begins with the beginning-of-sequence token, as in the model's training. Prints perplexities at
50 % and 2:4, and the rise over dense as a share of magnitude's. Writes `benchmarks/results/stories.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from optimum_calibprune import machine
from optimum_calibprune.calibration.measure import mean_nll
from optimum_calibprune.pruning import schedule
from optimum_calibprune.records import METHODS, CalibrationRow, CalibrationSet, SparsityPattern


RESULT = Path(__file__).parent / "results" / "stories.json"
LENGTH = 256


def windows(stories: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    begin, body = tokenizer.bos_token_id, LENGTH - 1
    ids = [i for story in stories for i in (begin, *tokenizer(story, add_special_tokens=False)["input_ids"])]
    cut = np.array(ids[: len(ids) // body * body]).reshape(-1, body)
    return np.concatenate([np.full((len(cut), 1), begin), cut], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    first, second = (windows(part, tokenizer) for part in (stories[: len(stories) // 2], stories[len(stories) // 2 :]))
    calibration = CalibrationSet(first, tuple(CalibrationRow("stories", i, "general") for i in range(len(first))))

    def perplexity(asked: str | None = None, method: str = "") -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        if asked is not None:
            settings = schedule.Settings(SparsityPattern.parse(asked), method, micro_batch=16)
            for _ in schedule.prune_blocks(model, calibration, settings):
                pass
        return float(np.exp(mean_nll(model.eval(), second).mean()))

    dense = perplexity()
    rows = {asked: {method: perplexity(asked, method) for method in METHODS} for asked in ("50%", "2:4")}
    print(f"dense {dense:.2f}")
    for asked, found in rows.items():
        share = (found["sparsegpt"] - dense) / (found["magnitude"] - dense)
        print(asked, {m: round(p, 2) for m, p in found.items()}, f"SparseGPT's rise is {share:.2f} of magnitude's")
    result = {
        "dense": dense,
        "sparse": rows,
        "calibration_windows": len(first),
        "scored_windows": len(second),
        "length": LENGTH,
        "versions": machine.versions(),
        "hardware": machine.hardware(torch.device("cpu")),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
