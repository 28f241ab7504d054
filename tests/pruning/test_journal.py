# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, refused or out of room, and resumed: in the end the files of the undisturbed run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from optimum_calibprune.pruning.activations import PLACES
from optimum_calibprune.pruning.checkpoint import Checkpoint
from optimum_calibprune.pruning.homes import InMemory, Streamed, without_weights
from optimum_calibprune.pruning.journal import MANIFEST, Journal
from optimum_calibprune.pruning.schedule import Settings, prune_blocks
from optimum_calibprune.records import CalibrationRow, CalibrationSet, LayerReport, SparsityPattern


CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
BLOCKS = 3
SETTINGS = Settings(SparsityPattern(0.5), micro_batch=2)
IDENTITY = {"config": {"sparsity": "50%"}, "weights": "abc"}


def calibration() -> CalibrationSet:
    ids = np.random.default_rng(1).integers(0, 64, (5, 16))
    return CalibrationSet(ids, tuple(CalibrationRow("random", i, "general") for i in range(5)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=160, num_hidden_layers=BLOCKS, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def run(
    dense: Path, work: Path, *, resume: bool = False, streamed: bool = True, place: str = "device"
) -> list[LayerReport]:
    """One run, from a model on disk to a journal that holds all blocks."""
    if streamed:
        model = without_weights(AutoConfig.from_pretrained(dense), torch.bfloat16)
        home: Any = Streamed(model, Checkpoint.of_files(dense.glob("*.safetensors")), CPU)
    else:
        home = InMemory(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval())
    journal = Journal(work, IDENTITY, BLOCKS, resume=resume)
    settings = replace(SETTINGS, activations=place)
    walk = prune_blocks(home.model, calibration(), settings, home=home, journal=journal)
    return [report for block in walk for report in block]


def hashes(work: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(work.glob("model-*"))}


@pytest.fixture(scope="module")
def undisturbed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("undisturbed") / "work"
    run(dense, work)
    found = hashes(work)
    assert len(found) == BLOCKS + 1
    assert sorted(path.name for path in work.iterdir()) == sorted(
        [*found, MANIFEST, *(f"reports-{i:05d}.json" for i in range(BLOCKS))]
    )
    return found


def die_at(call: str, number: int, function: Any, *args: Any, **kwargs: Any) -> None:
    """In a process of its own: dies by SIGKILL in the given call of a function of `os`, before it has done anything."""
    real, calls = getattr(os, call), iter(range(number + 1))

    def counted(*given: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **options)

    setattr(os, call, counted)
    function(*args, **kwargs)


def in_a_process(target: Any, *args: Any, **kwargs: Any) -> int | None:
    """Its exit code: minus the signal where it was killed."""
    process = FORK.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("streamed", [True, False])
def test_the_same_files_wherever_hidden_states_are_kept(
    place: str, streamed: bool, dense: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run(dense, tmp_path / "work", streamed=streamed, place=place)
    assert hashes(tmp_path / "work") == undisturbed


@pytest.mark.parametrize("place", ["device", "file"])
def test_killed_before_every_sync_to_the_disk_and_resumed_each_time(
    place: str, dense: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Each time the process comes one sync further: some of these are in the middle of a shard."""
    work, killed = tmp_path / "work", 0
    for number in range(200):
        shutil.rmtree(work, ignore_errors=True)
        code = in_a_process(die_at, "fsync", number, run, dense, work, place=place)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        run(dense, work, resume=(work / MANIFEST).is_file(), place=place)
        assert hashes(work) == undisturbed
        assert not [*work.glob(".*"), *work.glob("hidden-states*")]
    assert killed > 4 * BLOCKS


def test_killed_at_random_moments_and_resumed_each_time(
    dense: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Twenty times; where a run comes to its end before it is killed, its files are looked at, and another one begins."""
    work, moments, killed = tmp_path / "work", np.random.default_rng(0), 0
    started = time.monotonic()
    assert in_a_process(run, dense, work) == 0
    longest = time.monotonic() - started
    while killed < 20:
        if (work / MANIFEST).is_file() and json.loads((work / MANIFEST).read_text())["done"] == BLOCKS:
            assert hashes(work) == undisturbed
            shutil.rmtree(work)
        process = FORK.Process(target=run, args=(dense, work), kwargs={"resume": (work / MANIFEST).is_file()})
        process.start()
        process.join(moments.uniform(0, longest))
        killed += process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    run(dense, work, resume=(work / MANIFEST).is_file())
    assert hashes(work) == undisturbed


@pytest.mark.parametrize(
    ("identity", "differs"),
    [
        ({"config": {"sparsity": "60%"}, "weights": "abc"}, r'config\.sparsity was "50%" and is "60%"'),
        ({"config": {"sparsity": "50%"}, "weights": "abd"}, r'weights was "abc" and is "abd"'),
        ({**IDENTITY, "more": 1}, "more was null and is 1"),
    ],
)
def test_another_run_is_refused_with_what_differs(identity: dict[str, Any], differs: str, tmp_path: Path) -> None:
    Journal(tmp_path / "work", IDENTITY, BLOCKS)
    with pytest.raises(ValueError, match=f"cannot be resumed with what was given: {differs}\\."):
        Journal(tmp_path / "work", identity, BLOCKS, resume=True)


def test_hidden_states_of_earlier_blocks_do_not_stay(dense: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A kill between the manifest and the removal leaves them."""
    work = tmp_path / "work"
    assert in_a_process(die_at, "unlink", 0, run, dense, work) == -signal.SIGKILL
    assert len(list(work.glob("hidden-states*"))) == 1
    (work / "hidden-states-00000.0.bin").touch()
    run(dense, work, resume=True)
    assert hashes(work) == undisturbed
    assert not list(work.glob("hidden-states*"))


def test_a_torn_shard_and_a_wrong_index_are_told(dense: Path, tmp_path: Path) -> None:
    (path,) = dense.glob("*.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"torn\.safetensors is not a whole safetensors file"):
        Checkpoint.of_files([torn])
    with pytest.raises(OSError, match="is not a whole safetensors file"), Checkpoint({"x": torn}).read(["x"]):
        pass
    with pytest.raises(OSError, match="lacks nothing, which the index of the checkpoint puts there"):
        Checkpoint({"nothing": path}).read(["nothing"]).__enter__()


def test_another_calibration_set_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "work", IDENTITY, BLOCKS).expect("calibration", "one")
    again = Journal(tmp_path / "work", IDENTITY, BLOCKS, resume=True)
    again.expect("calibration", "one")
    with pytest.raises(ValueError, match='calibration was "one" and is "other"'):
        again.expect("calibration", "other")


def test_folders_with_something_else_in_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        Journal(tmp_path / "work", IDENTITY, BLOCKS, resume=True)
    Journal(tmp_path / "work", IDENTITY, BLOCKS)
    with pytest.raises(FileExistsError, match="an unfinished run; go on with it by --resume"):
        Journal(tmp_path / "work", IDENTITY, BLOCKS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="other files"):
        Journal(tmp_path / "other", IDENTITY, BLOCKS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this process may not mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("place", ["device", "file"])
def test_a_full_disk_is_told_with_the_need_and_the_run_resumes_when_there_is_room(
    place: str, small_disk: Path, dense: Path, undisturbed: dict[str, str]
) -> None:
    with pytest.raises(OSError, match=r"needs 0\.\d MiB, and its disk has 0\.\d MiB free .*make room, and resume"):
        run(dense, small_disk / "work", place=place)
    assert 0 < json.loads((small_disk / "work" / MANIFEST).read_text())["done"] < BLOCKS
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    run(dense, small_disk / "work", resume=True, place=place)
    assert hashes(small_disk / "work") == undisturbed
