# SPDX-License-Identifier: Apache-2.0
"""Run model-generated Python programs where they can do no harm, and judge whether each ran to its end."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path


# Lets a busy machine start and clean up; the supervisor itself enforces the program's own limits.
_GRACE_SECONDS = 20.0
Job = tuple[str, str]  # a program and its tests
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Limits:
    """What a program and its tests may use up.

    Args:
        processor_seconds: Processor time of both and of all that they start, which hardly depends on what else runs.
        wall_seconds: Ends those that wait, for each other or for nothing.
        memory_bytes: Address space of each process.
    """

    processor_seconds: float = 5.0
    wall_seconds: float = 30.0
    memory_bytes: int = 512 * 2**20


DEFAULT_LIMITS = Limits()
_PROBES = (
    f"""
import os
try:
    open(os.__file__).close()
except OSError:
    raise AssertionError("other users cannot read the library of this Python") from None
assert os.getuid() != 0, "still root"
assert not os.environ and not os.listdir(), "surroundings are not empty"
try:
    bytearray({DEFAULT_LIMITS.memory_bytes})
except MemoryError:
    pass
else:
    raise AssertionError("memory is not limited")
""",
    """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        socket.socket(socket.AF_INET, kind).connect(("127.0.0.1", PORT))
    except OSError:
        continue
    raise AssertionError("the network is open")
""",
    """
for path in ("/etc/passwd", "/proc/self/status"):
    try:
        open(path)
    except OSError:
        continue
    raise AssertionError("files are open")
""",
)


class SandboxUnavailable(RuntimeError):
    """Generated code was not run, because it cannot be isolated here."""


@dataclass(frozen=True)
class Verdict:
    """How one program fared."""

    passed: bool
    reason: str
    seconds: float

    @property
    def settled(self) -> bool:
        """False where the program ran out of wall-clock time, which depends on what else runs."""
        return self.reason != "timed out"


@dataclass(frozen=True)
class Isolation:
    """What this machine keeps from generated code, each found by a program that tried.

    Args:
        available: Programs can be run: by an unprivileged user, with limits and an empty environment, cut off from the
            network and from all files but Python's library and system libraries, which are read-only.
        reason: Why programs cannot be run; empty where they can.
        namespaces: The program runs in namespaces of its own, rather than under a spare user id only.
    """

    available: bool
    reason: str = ""
    namespaces: bool = False


@functools.cache
def isolation() -> Isolation:
    """Find out, once, how well this machine can isolate a program.

    Two ways are tried, and the first that works is used for all programs:

    1. Namespaces, as root or where the kernel lets users create them: the program sees no other process, no network,
       and no files but Python's library (read-only) and a small folder in memory. What it starts ends with it,
       because the kernel ends a process namespace with its first process.
    2. As root without the right to create namespaces (most containers): a spare user id. Landlock closes all files but
       Python's library and a folder, and a filter of system calls the network. Everything of that user id is killed at the end.

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


def check_program(program: str, tests: str, limits: Limits = DEFAULT_LIMITS) -> Verdict:
    """Run one generated program and its tests; it passes if the tests reach their end without an exception.

    A bare Python, the supervisor, forks a keeper, which forks a process for the tests and one for the program, locks both
    up, and kills them with all that they have started. What the tests use of the program they ask of its process, and get
    plain values or stand-ins (`remote.py`): so no program can patch what its tests compare with, jump over them, end them
    early, or return an object that equals everything. A pass is a secret of the tests' process, to which nothing leads from
    the program's. Where the tests compare one object of the program with another, or use its own helper, it has its say.

    Tests cannot hand the program objects of classes that they define themselves; such classes belong into the program.

    Args:
        program: Source text: prompt and completion. It is not the main module.
        tests: Source text that uses names of the program.
        limits: What ends them before their end.

    Raises:
        SandboxUnavailable: Nothing was run, because it cannot be isolated here.
    """
    return _judge((program, tests), limits, _available().namespaces)


def check_programs(
    programs: Sequence[tuple[str, str]], limits: Limits = DEFAULT_LIMITS, *, workers: int = 2
) -> list[Verdict]:
    """Check many pairs of program and tests, `workers` at a time, and return their verdicts in order; see `check_program`.

    Equal pairs run once, and not again in a later call of this process, unless they ran out of wall-clock time. A worker
    keeps one supervisor; the programs that it runs one after another are isolated from each other as from all else.
    """
    if not programs:
        return []
    way = (limits, _available().namespaces)
    verdicts = {job: _VERDICTS.recall(job, way) for job in programs}
    waiting = deque(job for job, verdict in verdicts.items() if verdict is None)
    with ThreadPoolExecutor(workers) as pool:
        try:
            started = [pool.submit(_judge_all, waiting, *way) for _ in range(min(workers, len(waiting)))]
            for worker in started:
                verdicts |= worker.result()
        finally:
            waiting.clear()  # after Ctrl-C, or where one worker cannot isolate its program
    _VERDICTS.keep(verdicts, way)
    return [verdicts[job] for job in programs]


def _available() -> Isolation:
    level = isolation()
    if not level.available:
        raise SandboxUnavailable(level.reason)
    return level


class _Verdicts:
    """The verdicts of this process, the latest used of them, if they are settled."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._verdicts: dict[tuple[Job, tuple[Limits, bool]], Verdict] = {}  # the last used come last

    def recall(self, job: Job, way: tuple[Limits, bool]) -> Verdict | None:
        return self._verdicts.get((job, way))

    def keep(self, verdicts: dict[Job, Verdict], way: tuple[Limits, bool]) -> None:
        for job, verdict in verdicts.items():
            self._verdicts.pop((job, way), None)
            if verdict.settled:
                self._verdicts[job, way] = verdict
        for key in list(self._verdicts)[: -self._size]:
            self._verdicts.pop(key, None)


_VERDICTS = _Verdicts(2**14)


def _probe(*, namespaces: bool) -> Isolation:
    """Try what the programs must not manage, locked up in one of the two ways."""
    try:
        with (
            _Supervisor(DEFAULT_LIMITS, namespaces) as supervisor,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            for probe in _PROBES:
                verdict = supervisor.judge((probe.replace("PORT", str(server.getsockname()[1])), ""))
                if not verdict.passed:
                    return Isolation(available=False, reason=verdict.reason)
    except (OSError, SandboxUnavailable) as error:
        return Isolation(available=False, reason=str(error))
    return Isolation(available=True, namespaces=namespaces)


def _judge(job: Job, limits: Limits, namespaces: bool) -> Verdict:
    """Judge one program with a supervisor of its own."""
    with _Supervisor(limits, namespaces) as supervisor:
        return supervisor.judge(job)


def _judge_all(waiting: deque[Job], limits: Limits, namespaces: bool) -> dict[Job, Verdict]:
    """Judge programs, with one supervisor, until none is waiting."""
    verdicts = {}
    with _Supervisor(limits, namespaces) as supervisor:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:  # another worker took the last one
                return verdicts
            verdicts[job] = supervisor.judge(job)


class _Supervisor:
    """A bare Python that judges one program after another; it starts with the first one, and again where it ended."""

    def __init__(self, limits: Limits, namespaces: bool) -> None:
        self._seconds = limits.wall_seconds + _GRACE_SECONDS
        self._arguments = [*map(str, astuple(limits)), str(int(namespaces)), str(os.getpid())]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def judge(self, job: Job) -> Verdict:
        """Run program and tests in a fresh folder. Raises `SandboxUnavailable` if a fresh supervisor cannot judge it."""
        fresh = self._process is None
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="calibprune-", ignore_cleanup_errors=True) as folder:
            answer = self._ask(job, folder)
        if not answer.startswith("! "):
            passed, elapsed, reason = answer.split(" ", 2)
            return Verdict(passed=passed == "1", reason=reason, seconds=float(elapsed))
        self._end()
        if time.monotonic() - start >= self._seconds:
            return Verdict(passed=False, reason="timed out", seconds=self._seconds)
        if fresh:
            raise SandboxUnavailable(answer.removeprefix("! "))
        return self.judge(job)  # no program pays for what happened before it

    def _ask(self, job: Job, folder: str) -> str:
        """The supervisor's answer, or "! " and why there is none."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        limit = threading.Timer(self._seconds, process.kill)
        limit.start()
        try:
            program, tests = (text.encode("utf-8", "surrogatepass") for text in job)
            process.stdin.write(f"{len(program)} {len(tests)} {folder}\n".encode() + program + tests)
            process.stdin.flush()
            length = process.stdout.readline()
            answer = process.stdout.read(int(length or 0)).decode("utf-8", "replace")
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        if answer:
            return answer
        process.wait()
        complaint = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"! {complaint[-1] if complaint else f'supervisor ended with {process.returncode}'}"

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxUnavailable(f"Python does not start: {error}") from error

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()  # with it the keeper dies, and with that the program
            self._process.communicate()
            self._process = None
