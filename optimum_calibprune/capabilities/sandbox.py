# SPDX-License-Identifier: Apache-2.0
"""Run model-generated Python programs where they can do no harm, and judge whether each ran to its end."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


# Lets a busy machine start and clean up; the supervisor itself enforces the program's own limit.
_GRACE_SECONDS = 20.0
_MEMORY_BYTES = 512 * 2**20
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_BASIC_PROBE = f"""
import os
try:
    import math
except ImportError:
    raise AssertionError("other users cannot read the library of this Python") from None
assert os.getuid() != 0, "still root"
assert not os.environ and not os.listdir(), "surroundings are not empty"
try:
    bytearray({_MEMORY_BYTES})
except MemoryError:
    pass
else:
    raise AssertionError("memory is not limited")
"""
_NETWORK_PROBE = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
except OSError:
    pass
else:
    raise AssertionError("the network is open")
"""
_FILES_PROBE = """
try:
    open("/etc/passwd")
except OSError:
    pass
else:
    raise AssertionError("files are open")
"""


class SandboxUnavailable(RuntimeError):
    """Generated code was not run, because it cannot be isolated here."""


@dataclass(frozen=True)
class Verdict:
    """How one program fared."""

    passed: bool
    reason: str
    seconds: float


@dataclass(frozen=True)
class Isolation:
    """What this machine keeps from generated code, each found by a program that tried.

    Args:
        available: Programs can be run: own process, limits, unprivileged user, empty environment.
        reason: Why programs cannot be run; empty where they can.
        user: The program runs as an unprivileged user.
        network: The network is cut off.
        files: All files are out of sight but Python's library and system libraries, which are read-only.
        namespaces: The program runs in namespaces of its own, rather than under a spare user id only.
    """

    available: bool
    reason: str = ""
    user: bool = False
    network: bool = False
    files: bool = False
    namespaces: bool = False


@functools.cache
def isolation() -> Isolation:
    """Find out, once, how well this machine can isolate a program.

    Two ways are tried, and the first that works is used for all programs:

    1. Namespaces, as root or where the kernel lets users create them: the program sees no other process, no network,
       and no files but Python's library (read-only) and a small folder in memory. What it starts ends with it,
       because the kernel ends a process namespace with its first process.
    2. As root without the right to create namespaces (most containers): a spare user id, with Landlock in front of
       the files where the kernel has it. The network stays open. Everything of that user id is killed at the end.

    As root, both give up root for a spare user id. Without root and without namespaces a program would run as the
    user, with the user's files and processes in reach, so it is not run at all.
    """
    in_namespaces = _probe(namespaces=True)
    if in_namespaces.available:
        return in_namespaces
    as_spare_user = _probe(namespaces=False)
    if as_spare_user.available:
        return as_spare_user
    reason = f"no namespaces ({in_namespaces.reason}) and no spare user ({as_spare_user.reason})"
    return Isolation(available=False, reason=f"generated code cannot be isolated here: {reason}")


def run_program(program: str, *, timeout_seconds: float = 5.0, memory_bytes: int = _MEMORY_BYTES) -> Verdict:
    """Run one program; it passes if it reaches its end without an exception.

    A bare Python, the supervisor, forks the process that runs the program, locks it up, and kills it with all it has
    started. A pass is a secret that it sends once the process is locked up, and that comes back only from the
    program's end. Ordinary Python code cannot reach the secret, but no check inside one process withstands a program
    that reads its own memory, nor one that redefines what its tests use or returns objects equal to everything.

    Args:
        program: Source text, tests included.
        timeout_seconds: Wall-clock limit.
        memory_bytes: Limit on the address space of each process of the program.

    Raises:
        SandboxUnavailable: The program was not run, because it cannot be isolated here.
    """
    level = isolation()
    if not level.available:
        raise SandboxUnavailable(level.reason)
    return _judge(program, timeout_seconds, memory_bytes, level.namespaces)


def run_programs(
    programs: Sequence[str], *, workers: int = 2, timeout_seconds: float = 5.0, memory_bytes: int = _MEMORY_BYTES
) -> list[Verdict]:
    """Run many programs, `workers` at a time, and return their verdicts in order; see `run_program`."""
    isolation()  # probe once, before the workers all ask
    run = functools.partial(run_program, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, programs))


def _probe(*, namespaces: bool) -> Isolation:
    """Try what the programs must not manage, locked up in one of the two ways."""

    def attempt(program: str) -> Verdict:
        return _judge(program, _GRACE_SECONDS, _MEMORY_BYTES, namespaces)

    try:
        basic = attempt(_BASIC_PROBE)
        if not basic.passed:
            return Isolation(available=False, reason=basic.reason)
        with socket.create_server(("127.0.0.1", 0)) as server:
            network = attempt(_NETWORK_PROBE.format(port=server.getsockname()[1])).passed
        files = attempt(_FILES_PROBE).passed
    except (OSError, SandboxUnavailable) as error:
        return Isolation(available=False, reason=str(error))
    return Isolation(available=True, user=True, network=network, files=files, namespaces=namespaces)


def _judge(program: str, seconds: float, memory: int, namespaces: bool) -> Verdict:
    """Have a supervisor run the program, and read its verdict."""
    with tempfile.TemporaryDirectory(prefix="calibprune-", ignore_cleanup_errors=True) as folder:
        arguments = [folder, str(seconds), str(memory), str(int(namespaces))]
        try:
            supervisor = subprocess.run(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), *arguments],
                input=program.encode("utf-8", "surrogatepass"),
                capture_output=True,
                timeout=seconds + _GRACE_SECONDS,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return Verdict(passed=False, reason="timed out", seconds=seconds + _GRACE_SECONDS)
        except OSError as error:
            raise SandboxUnavailable(f"Python does not start: {error}") from error
    if supervisor.returncode != 0:
        complaint = supervisor.stderr.decode("utf-8", "replace").strip().splitlines()
        raise SandboxUnavailable(complaint[-1] if complaint else f"supervisor ended with {supervisor.returncode}")
    passed, elapsed, reason = supervisor.stdout.decode("utf-8", "replace").split(" ", 2)
    return Verdict(passed=passed == "1", reason=reason, seconds=float(elapsed))
