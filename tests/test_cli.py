# SPDX-License-Identifier: Apache-2.0
"""The command line, run as a user runs it: what it prints, what it leaves behind, how it exits."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimum_calibprune import RunRecord
from optimum_calibprune.records import Mix


CLI = str(Path(sys.executable).parent / "optimum-cli")
SMALL = ["--samples", "8", "--length", "64"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, "calibprune", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_prune_prints_plan_and_retention_and_saves(tmp_path: Path) -> None:
    options = ["--sparsity", "2:4", "--mix", "uniform", "--capabilities", "general"]
    done = run("prune", "pocket", *options, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan, _, result = done.stdout.partition("\n\n")
    assert "Prune pocket to 2:4 with sparsegpt, calibrated on 64 x 256 tokens" in plan
    assert "42 linear layers in 6 blocks" in plan
    assert "general (worst)" in result
    assert "Saved to out (50.00% zeros)" in result
    record = RunRecord.from_json((tmp_path / "out" / "calibprune.json").read_text())
    assert f"{100 * record.capabilities.total:.1f} %" in result
    assert record.command.startswith("optimum-cli calibprune prune pocket --sparsity 2:4 --mix uniform")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_recorded_command_does_it_again_and_json_goes_to_stdout_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"{i} plus {i} is {2 * i}." for i in range(400)))
    options = ["--sources", f"notes={notes}:math", "gsm8k", "--capabilities", "none", "--seed", "3", *SMALL, "--json"]
    first = run("prune", "pocket", *options, "--output", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    record = RunRecord.from_json(first.stdout)
    assert "Prune pocket" in first.stderr
    assert str(tmp_path) not in first.stdout
    words = record.command.replace("--output DIR", "--output b").split()
    again = subprocess.run([CLI, *words[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_sparsity_by_module_from_the_plan_to_the_card_and_again(tmp_path: Path) -> None:
    asked = "*.down_proj=dense,*.mlp.*=70%,*=50%"
    options = ["--sparsity", asked, "--mix", "uniform", "--capabilities", "none", *SMALL]
    first = run("prune", "pocket", *options, "--output", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"Prune pocket to {asked} with sparsegpt" in first.stdout
    assert "6 x left dense, as asked by '*.down_proj'" in first.stdout
    record = RunRecord.from_json((tmp_path / "a" / "calibprune.json").read_text())
    for layer in record.prune.layers:
        share = layer.zeros_asked / (layer.shape[0] * layer.shape[1])
        assert share == pytest.approx(0.7 if ".mlp." in layer.module else 0.5, abs=1e-4)
    assert f"`{asked}`" in (tmp_path / "a" / "README.md").read_text()
    words = shlex.split(record.command.replace("--output DIR", "--output b"))
    again = subprocess.run([CLI, *words[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_owl_from_the_plan_to_the_card_and_again(tmp_path: Path) -> None:
    options = ["--mix", "uniform", "--capabilities", "none", *SMALL]
    without = run("prune", "pocket", *options, "--output", "without", cwd=tmp_path)
    assert without.returncode == 0, without.stderr
    first = run("prune", "pocket", "--allocation", "owl", *options, "--output", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "allocation     owl: blocks with more outliers lose less" in first.stdout
    records = {
        name: RunRecord.from_json((tmp_path / name / "calibprune.json").read_text()) for name in ("without", "a")
    }
    asked = {name: [layer.zeros_asked for layer in record.prune.layers] for name, record in records.items()}
    assert sum(asked["a"]) == sum(asked["without"])
    assert asked["a"] != asked["without"]
    assert "(OWL, arXiv:2310.05175)" in (tmp_path / "a" / "README.md").read_text()
    words = shlex.split(records["a"].command.replace("--output DIR", "--output b"))
    again = subprocess.run([CLI, *words[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "a", "b")]
    assert files[0] != files[1] == files[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pocket", "--mix", "unifrom", "--output", "out"], "Unknown mix 'unifrom'. Did you mean 'uniform'?"),
        (["pocket", "--sparsity", "1.2", "--output", "out"], "Sparsity must lie between 0 and 1"),
        (["pocket", "--allocation", "owl", "--sparsity", "2:4", "--output", "out"], "which n:m does not allow"),
        (["pocket", "--sparsity", "*.mpl.*=70%,*=50%", "--output", "out"], "fits no module that can be pruned"),
        (["pocket", "--output", "taken"], "taken is not empty"),
        (["pocket"], "the following arguments are required: --output"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    done = run("prune", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["taken", "taken/file"]


def test_a_run_that_fails_exits_with_1_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tiny.jsonl").write_text('{"text": "1 + 1 = 2"}\n')
    done = run("prune", "pocket", "--sources", "tiny=tiny.jsonl:math", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "'tiny' is too short" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.jsonl"]


@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5, 3.0])
def test_an_interrupt_leaves_what_was_there(tmp_path: Path, seconds: float) -> None:
    """At whatever moment, also while a library that swallows every exception is being imported."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("mine")
    process = subprocess.Popen(
        [CLI, "calibprune", "prune", "pocket", "--output", "out", "--overwrite"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the plan is printed: the run has begun
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().endswith("Interrupted; nothing was left behind.")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["out", "out/old"]


def test_sources_lists_the_table_with_two_for_each_capability(tmp_path: Path) -> None:
    done = run("sources", cwd=tmp_path)
    assert done.returncode == 0
    on_hub = [line.split()[1] for line in done.stdout.splitlines() if "/" in line and "NAME=PATH" not in line]
    assert all(on_hub.count(capability) >= 2 for capability in ("general", "commonsense", "code", "math"))
    assert "upper bound" in done.stdout


def test_mix_shows_and_writes_a_calibration_set(tmp_path: Path) -> None:
    done = run("mix", "pocket", *SMALL, "--output", "set", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "J = " in done.stdout
    mix = Mix.from_json((tmp_path / "set" / "mix.json").read_text())
    assert sum(mix.quotas.values()) == 8
    assert (tmp_path / "set" / "calibration.safetensors").stat().st_size > 8 * 64 * 8


def test_evaluate_measures_the_dense_pocket(tmp_path: Path) -> None:
    done = run("evaluate", "pocket", "--capabilities", "general,math", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = {t["task"]: t["item_scores"] for t in json.loads(done.stdout)["scores"]["tasks"]}
    assert sum(scores["pocket_general"]) / 400 > 0.98
    assert sum(scores["pocket_math"]) / 400 > 0.88
