# SPDX-License-Identifier: Apache-2.0
"""How much memory a model needs that is streamed from disk, and whether it becomes the same as in memory.

    python benchmarks/streaming.py [--blocks 24 12] [--no-memory]

Random bf16 checkpoints of Llama's layout (hidden 2048, MLP 5632, vocabulary 32,000; 24 blocks: 2.2 GB) are made on the spot,
pruned by the pipeline on 8 samples of 512 tokens, each run in a process of its own, and removed. Peaks are the kernel's
counter (VmHWM). Writes `benchmarks/results/streaming.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_calibprune import CalibPruner, machine, pocket


RESULT = Path(__file__).parent / "results" / "streaming.json"
HIDDEN, MLP, VOCABULARY, KEYS = 2048, 5632, 32_000, 4
SAMPLES, LENGTH = 8, 512
TEXT = pocket.MODEL.parent / "texts" / "wikitext2.jsonl"


def make_checkpoint(folder: Path, blocks: int) -> int:
    """Returns its number of parameters; the tokenizer is the pocket's, whose ids fit into the larger vocabulary."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=KEYS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(pocket.MODEL).save_pretrained(folder)
    return model.num_parameters()


def allowed(libraries: int) -> tuple[dict[str, int], int]:
    """What must be in memory at once, by name, in bytes; and the bar: all of it and 15 %."""
    heads = HIDDEN // 32 * KEYS
    needs = {
        "interpreter and libraries": libraries,
        "one block": 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * heads + 3 * HIDDEN * MLP + 2 * HIDDEN),
        "three of the largest Hessians": 3 * 4 * MLP * MLP,
        "the largest weight in fp32": 4 * HIDDEN * MLP,
        "hidden states": 2 * SAMPLES * LENGTH * HIDDEN,
    }
    return needs, int(1.15 * sum(needs.values()))


def run(checkpoint: Path, output: Path, stream: bool) -> None:
    """The child: prunes and saves; prints what it took as one line of JSON."""
    import datasets  # noqa: F401 (the last of the libraries that a run needs)

    CalibPruner.from_pretrained("pocket", capabilities="none", samples=1, mix="single:wikitext2").plan()
    libraries = memory("VmRSS")
    started = time.perf_counter()
    pruner = CalibPruner.from_pretrained(
        str(checkpoint),
        stream=stream,
        sparsity="60%",
        mix="single:wikitext2",
        sources=[f"wikitext2={TEXT}:general"],
        samples=SAMPLES,
        length=LENGTH,
        capabilities="none",
        perplexity_text=None,
    )
    record = pruner.prune(work_dir=output.with_suffix(".work") if stream else None)
    peak = memory("VmHWM")
    pruner.save_pretrained(output)
    seconds = {**record.seconds, "all": time.perf_counter() - started}
    sys.stdout.write(json.dumps({"libraries": libraries, "peak": peak, "seconds": seconds}) + "\n")


def memory(counter: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{counter}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"The kernel has no counter {counter}.")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a saved model."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                data = file.get_tensor(key).contiguous().flatten().view(torch.uint8).numpy()
                found[key] = hashlib.sha256(data).hexdigest()
    return found


def measured(checkpoint: Path, output: Path, stream: bool) -> dict:
    words = [sys.executable, __file__, "--run", str(checkpoint), str(output), *(["--stream"] if stream else [])]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[24, 12])
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the run in memory that the result is compared with"
    )
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(*given.run, stream=given.stream)
        return
    rows = []
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            row = {"blocks": blocks, "parameters": make_checkpoint(folder / "dense", blocks)}
            row["streamed"] = measured(folder / "dense", folder / "streamed", stream=True)
            needs, bar = allowed(row["streamed"]["libraries"])
            row |= {"needs": needs, "bar": bar, "within": row["streamed"]["peak"] <= bar}
            if not given.no_memory and blocks == given.blocks[0]:
                row["in memory"] = measured(folder / "dense", folder / "memory", stream=False)
                row["same bytes"] = hashes(folder / "streamed") == hashes(folder / "memory")
            rows.append(row)
            print(json.dumps(row, indent=1))
    result = {
        "what": f"hidden {HIDDEN}, MLP {MLP}, bf16, {SAMPLES} x {LENGTH} tokens, 60 %; bytes and seconds",
        "rows": rows,
        "versions": machine.versions(),
        "hardware": machine.hardware(torch.device("cpu")),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
