# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a 1B Llama's shape goes through the command line: seconds by stage and peak memory.

    python benchmarks/checkpoint_1b.py [--samples 4] [--length 128]

Random bf16 weights in several safetensors shards are made on the spot (2.5 GB of disk, removed afterwards). The peak is that
of the command, as the kernel counts it. Writes `benchmarks/results/checkpoint_1b.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_calibprune import RunRecord, machine, pocket


RESULT = Path(__file__).parent / "results" / "checkpoint_1b.json"
CLI = Path(sys.executable).parent / "optimum-cli"


def make_checkpoint(folder: Path) -> int:
    """Llama-3.2-1B's shape; the tokenizer is the pocket's, whose ids fit into the larger vocabulary."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(pocket.MODEL).save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base, out = Path(temporary) / "base", Path(temporary) / "sparse"
        parameters = make_checkpoint(base)
        shards = len(list(base.glob("*.safetensors")))
        sources = [f"{name}={s.path}:{s.capability}" for name, s in pocket.sources().items() if not s.upper_bound]
        command = [str(CLI), "calibprune", "prune", str(base), "--sparsity", "50%", "--sources", *sources]
        command += ["--samples", str(given.samples), "--length", str(given.length), "--output", str(out)]
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        record = RunRecord.from_json((out / "calibprune.json").read_text())
        loaded = AutoModelForCausalLM.from_pretrained(out)
        zeros = sum(int((loaded.get_submodule(layer.module).weight == 0).sum()) for layer in record.prune.layers)
        assert zeros == record.prune.zeros
        shutil.rmtree(out)
    result = {
        "parameters": parameters,
        "shards": shards,
        "samples": given.samples,
        "length": given.length,
        "zeros": zeros,
        "pruned_weights": record.prune.weights,
        "seconds": round(seconds, 1),
        "seconds_by_stage": {stage: round(value, 1) for stage, value in record.seconds.items()},
        "seconds_estimated": round(record.plan.seconds, 1),
        "peak_memory_gib": round(peak / 2**30, 2),
        "versions": machine.versions(),
        "hardware": machine.hardware(torch.device("cpu")),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
