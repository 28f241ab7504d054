# SPDX-License-Identifier: Apache-2.0
"""Attacks on the sandbox, each tried in every way of isolation that this machine has."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimum_calibprune.capabilities import sandbox, supervisor
from optimum_calibprune.capabilities.sandbox import (
    Isolation,
    Limits,
    SandboxUnavailable,
    Verdict,
    check_program,
    check_programs,
)


MEMORY = 512 * 2**20 + os.getpid()  # tells the processes of these tests from all others


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder where every user of the machine may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def denied(statement: str, error: str = "OSError") -> str:
    """A program that passes if the statement raises the error."""
    return f"import os\ntry:\n    {statement}\nexcept {error}:\n    pass\nelse:\n    raise AssertionError('allowed')\n"


def processes_with(mark: str) -> list[str]:
    """Live processes that carry the mark as an argument, as every process of a run carries its memory limit."""
    found = []
    for folder in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        try:
            if mark.encode() in Path("/proc", folder, "cmdline").read_bytes().split(b"\0"):
                found.append(folder)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until_gone(mark: str) -> bool:
    deadline = time.monotonic() + 2
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not processes_with(mark)


def run_program(program: str, **limits: float) -> Verdict:
    return check_program(program, "", Limits(**limits))


def run_programs(programs: list[str], workers: int = 2, **limits: float) -> list[Verdict]:
    return check_programs([(program, "") for program in programs], Limits(**limits), workers=workers)


def test_this_machine_says_what_it_can_do() -> None:
    level = sandbox.isolation()
    assert level is sandbox.isolation()
    assert level.available != bool(level.reason)
    if not level.available:
        with pytest.raises(SandboxUnavailable, match="cannot be isolated"):
            run_program("pass")


def test_nothing_runs_where_the_probe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.isolation.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sandbox.sys, "executable", "/nonexistent/python")
            assert not sandbox.isolation().available
            with pytest.raises(SandboxUnavailable, match="does not start"):
                run_program("pass")
            with pytest.raises(SandboxUnavailable, match="does not start"):
                run_programs(["pass", "pass"])
    finally:
        sandbox.isolation.cache_clear()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can become a spare user")
def test_an_ordinary_user_without_namespaces_is_refused() -> None:
    level = sandbox._probe(namespaces=False)
    assert not level.available
    assert "only root" in level.reason


def change_supervisor(change: Callable[[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on another one, in a folder that everybody can read, judges programs."""
    for name in ("supervisor", "remote", "system_calls"):
        text = Path(sandbox.__file__).with_name(f"{name}.py").read_text()
        (folder / f"{name}.py").write_text(change(text))
    monkeypatch.setattr(sandbox, "_SUPERVISOR", folder / "supervisor.py")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_a_program_that_kills_its_tests_before_they_begin_fails_alone(
    open_python: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", open_python)
    slow = "    secret, start = os.urandom(16)"

    def change(text: str) -> str:
        return text.replace(slow, f"    time.sleep(0.3)\n{slow}")

    change_supervisor(change, open_folder, monkeypatch)
    assert "time.sleep(0.3)" in (open_folder / "supervisor.py").read_text()
    if not (level := sandbox._probe(namespaces=False)).available:
        pytest.skip(level.reason)
    with sandbox._Supervisor(Limits(), namespaces=False) as supervisor:
        verdict = supervisor.judge(("import os, signal\nos.kill(-1, signal.SIGKILL)", ""))
        assert not verdict.passed
        assert supervisor.judge(("", "")).passed


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ("_refuse_system_calls()", "the network is open"),
        ("_drop_privileges(uid)", "still root|not permitted"),
        ("""_call("syscall", 446, rules, 0)""", "files are open"),
        ("_limit_resources(seconds, memory)", "memory is not limited"),
    ],
)
def test_nothing_runs_where_a_lock_does_not_hold(
    lock: str, reason: str, open_python: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", open_python)
    if not (level := sandbox._probe(namespaces=False)).available:
        pytest.skip(level.reason)
    change_supervisor(
        lambda text: re.sub(rf"^( +){re.escape(lock)}", r"\1pass", text, flags=re.M), open_folder, monkeypatch
    )
    level = sandbox._probe(namespaces=False)
    assert not level.available
    assert re.search(reason, level.reason), level.reason


def test_a_correct_program_passes(level: Isolation) -> None:
    program = "import collections, hashlib, math, random, re\ndef f(x):\n    return x + 1\nassert f(1) == 2\n"
    verdict = run_program(program)
    assert verdict == Verdict(passed=True, reason="passed", seconds=verdict.seconds)
    assert 0 <= verdict.seconds < 5


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "failed: AssertionError: not equal"),
        ("def f(:", "failed: SyntaxError: "),
        ("x = '\ud800'", "failed: SyntaxError: "),
        ("x = '\0'", "failed: "),
        ("raise KeyboardInterrupt", "failed: RuntimeError: KeyboardInterrupt"),
        ("import sys; sys.exit(0)", "failed: RuntimeError: SystemExit: 0"),
        ("import os; os._exit(0)", "failed: EOFError: the program ended before its tests did"),
        ("import os; os.closerange(0, 32); os._exit(0)", "failed: EOFError: "),
        ("import os; os.abort()", "failed: EOFError: "),
        ("print(input()) or input()", "failed: EOFError: EOF when reading a line"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "failed: EOFError: "),
        ("raise Exception('long ' * 10**6)", "failed: Exception: long"),
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(level: Isolation, program: str, reason: str) -> None:
    verdict = run_program(program)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)
    assert len(verdict.reason) < 2000


def test_a_busy_program_ends_at_the_limit_of_processor_time(level: Isolation) -> None:
    verdict = run_program("while True: pass", processor_seconds=0.3, wall_seconds=60)
    assert (verdict.passed, verdict.reason, verdict.settled) == (False, "out of processor time", True)


def test_a_program_that_sleeps_ends_at_the_limit_of_wall_time(level: Isolation) -> None:
    verdict = run_program("import time\ntime.sleep(60)", processor_seconds=60, wall_seconds=0.3)
    assert (verdict.passed, verdict.reason, verdict.settled) == (False, "timed out", False)
    assert 0.3 <= verdict.seconds < 30


def test_a_program_passes_that_waits_longer_than_its_processor_time(level: Isolation) -> None:
    verdict = run_program("import time\ntime.sleep(0.6)", processor_seconds=0.3)
    assert verdict.passed, verdict.reason
    assert verdict.seconds > 0.6


def test_a_program_passes_that_a_busy_machine_slows(level: Isolation) -> None:
    """The machine is made busy by stopping program and tests for most of the time."""
    verdicts: list[Verdict] = []
    program = "import time\nwhile time.process_time() < 0.2:\n    pass"
    limits = {"processor_seconds": 0.6, "memory_bytes": MEMORY}
    run = threading.Thread(target=lambda: verdicts.append(run_program(program, **limits)))
    run.start()
    while run.is_alive():
        slowed = processes_with(str(MEMORY))[2:]  # after supervisor and keeper
        for sent, seconds in ((signal.SIGSTOP, 0.1 if slowed else 0), (signal.SIGCONT, 0.02)):
            for process in slowed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), sent)
            time.sleep(seconds)
    run.join()
    assert verdicts[0].passed, verdicts[0].reason
    assert verdicts[0].seconds > 0.6


@pytest.mark.parametrize(
    "program",
    [
        "[child() for _ in range(4)]",
        "for _ in range(4):\n    os.waitpid(child(), 0)",
        "for _ in range(4):\n    if os.fork() == 0:\n        child()\n        os._exit(0)\n    os.wait()",
    ],
    ids=["side by side", "one after another", "orphans"],
)
def test_processor_time_is_that_of_all_processes(level: Isolation, program: str) -> None:
    """Each of four children uses a third of the limit."""
    child = "import os, time\ndef child():\n    if process := os.fork():\n        return process\n"
    child += "    while time.process_time() < 0.2:\n        pass\n    os._exit(0)\n"
    verdict = run_program(f"{child}{program}\ntime.sleep(60)", processor_seconds=0.6)
    assert verdict.reason == "out of processor time"


def test_children_whose_time_nobody_is_told_end_at_the_limit_of_wall_time(level: Isolation) -> None:
    program = "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n"
    program += "    if os.fork() == 0:\n        sum(range(10**5))\n        os._exit(0)\n    time.sleep(0.01)"
    verdict = run_program(program, processor_seconds=1.0, wall_seconds=0.7, memory_bytes=MEMORY)
    assert verdict.reason in ("timed out", "failed: BlockingIOError: [Errno 11] Resource temporarily unavailable")
    assert wait_until_gone(str(MEMORY))


def test_signals_do_not_hold_off_the_end(level: Isolation) -> None:
    program = """
import signal
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    pass
"""
    assert run_program(program, processor_seconds=0.3).reason == "out of processor time"


@pytest.mark.parametrize("program", ["x = bytearray(10**10)", "x = []\nwhile True: x.append(bytearray(10**6))"])
def test_a_memory_bomb_runs_out_of_memory(level: Isolation, program: str) -> None:
    verdict = run_program(program, memory_bytes=128 * 2**20)
    assert (verdict.passed, verdict.reason) == (False, "out of memory")


@pytest.mark.parametrize("descriptor", [1, 2, 3])
def test_endless_output_goes_nowhere(level: Isolation, descriptor: int) -> None:
    verdict = run_program(f"import os\nwhile True: os.write({descriptor}, bytes(65536))", wall_seconds=0.5)
    assert not verdict.passed
    assert len(verdict.reason) < 2000
    assert verdict.seconds < 1


def test_files_are_limited(level: Isolation) -> None:
    assert run_program("with open('small', 'w') as file: file.write('x')\nassert open('small').read() == 'x'").passed
    assert run_program(denied("open('large', 'wb').write(bytes(2**21))")).passed
    assert run_program(denied("files = [open('many', 'w') for _ in range(100)]")).passed


def test_a_deep_folder_does_not_trip_the_cleanup(level: Isolation) -> None:
    program = "import os\nfor _ in range(2000):\n    os.mkdir('d')\n    os.chdir('d')\n"
    run_program(program)
    assert run_program("import os; assert os.listdir() == []").passed


def test_the_environment_is_empty(level: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret of the user")
    program = """
import os
assert not os.environ
try:
    environments = [open(f"/proc/{process}/environ").read() for process in (os.getpid(), os.getppid(), "self")]
except OSError:
    environments = []
assert not any("HF_TOKEN" in environment for environment in environments)
"""
    verdict = run_program(program)
    assert verdict.passed, verdict.reason


def test_the_users_files_cannot_be_read(level: Isolation, open_folder: Path) -> None:
    private = open_folder / "private"
    private.write_text("a secret of the user")
    private.chmod(0o600)
    assert run_program(denied(f"open({str(private)!r})")).passed
    public = open_folder / "public"
    public.write_text("for every user to read")
    public.chmod(0o644)
    assert run_program(denied(f"open({str(public)!r})")).passed


def test_nothing_is_written_outside(level: Isolation, open_folder: Path) -> None:
    private = open_folder / "private"
    private.write_text("as it was")
    private.chmod(0o600)
    for statement in (
        f"open({str(private)!r}, 'w')",
        f"os.truncate({str(private)!r}, 0)",
        f"os.chmod({str(private)!r}, 0o777)",
        "open(os.path.join(os.path.dirname(os.__file__), 'planted.py'), 'w')",
        "os.chmod(os.__file__, 0o777)",
        "os.mkdir('/usr/lib/planted')",
        "os.chroot('.')",
    ):
        assert run_program(denied(statement)).passed, statement
    if level.namespaces:
        assert run_program("import os\nassert os.statvfs(os.__file__).f_flag & os.ST_RDONLY").passed
    assert private.read_text() == "as it was"
    assert private.stat().st_mode & 0o777 == 0o600
    assert run_program(denied(f"open({str(open_folder / 'new')!r}, 'w')")).passed
    assert run_program(denied(f"os.unlink({str(private)!r})")).passed
    assert os.listdir(open_folder) == ["private"]


def test_privileges_are_gone_for_good(level: Isolation) -> None:
    for statement in ("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.nice(-5)"):
        assert run_program(denied(statement)).passed, statement
    program = "import os\nassert 0 not in os.getresuid() + os.getresgid()"
    assert run_program(program).passed
    if os.geteuid() == 0:
        assert run_program("import os\nassert os.getgroups() == []").passed


def test_the_network_is_out_of_reach(level: Isolation) -> None:
    """Also to what a program starts, and the sockets of the machine that have no file."""
    name = f"calibprune {time.monotonic()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        local.bind(f"\0{name}")
        local.setblocking(False)
        ways = (
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('::1', 9))",
            f"socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '\\0{name}')",
            f"socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0{name}')",
        )
        for way in ways:
            subprocess.run([sys.executable, "-c", f"import socket\n{way}"], check=True)
            verdict = run_program("import socket\n" + denied(way))
            assert verdict.passed, (way, verdict.reason)
            child = f"status = os.fork() or (exec({denied(way)!r}, {{'socket': socket}}), os._exit(7))"
            verdict = run_program(f"import os, socket\n{child}\nassert os.waitpid(status, 0)[1] == 7 << 8")
            assert verdict.passed, (way, verdict.reason)
        assert [local.recv(9) for _ in ways[-2:]] == [b"x", b"x"], "outside the sandbox they arrive"
        with pytest.raises(BlockingIOError):
            local.recv(9)


def test_pairs_of_sockets_are_left_for_event_loops(level: Isolation) -> None:
    program = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nassert asyncio.run(f()) == 3"
    verdict = run_program(program)
    assert verdict.passed, verdict.reason


def test_a_fork_bomb_is_bounded(level: Isolation) -> None:
    program = """
import os, time
forks = 0
while forks < 100:
    try:
        child = os.fork()
    except BlockingIOError:
        break
    if child == 0:
        time.sleep(60)
    forks += 1
assert forks < 16
"""
    verdict = run_program(program, memory_bytes=MEMORY)
    assert verdict.passed, verdict.reason
    assert wait_until_gone(str(MEMORY))
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert not run_program(bomb, processor_seconds=0.5, memory_bytes=MEMORY).passed
    assert wait_until_gone(str(MEMORY))


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "time.sleep(60)"])
def test_a_daemon_dies_with_its_program(level: Isolation, end: str) -> None:
    program = f"""
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(0, 32)
        time.sleep(60)
    os._exit(0)
time.sleep(0.5)
{end}
"""
    mark, most = str(MEMORY), 0
    run = threading.Thread(target=run_program, args=[program], kwargs={"wall_seconds": 1, "memory_bytes": MEMORY})
    run.start()
    while run.is_alive():
        most = max(most, len(processes_with(mark)))
        time.sleep(0.02)
    run.join()
    assert most >= 3, "supervisor, program and daemon were never seen together"
    assert wait_until_gone(mark)


def test_a_program_dies_with_the_process_that_runs_it(level: Isolation, open_folder: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})
from optimum_calibprune.capabilities import sandbox, supervisor
sandbox._judge(("while True: pass", ""), sandbox.Limits(60, 60, {MEMORY}), {level.namespaces})
"""
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(open_folder)}) as caller:
        deadline = time.monotonic() + 20
        while len(processes_with(str(MEMORY))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        caller.kill()
    assert time.monotonic() < deadline, "supervisor and program were never seen together"
    assert wait_until_gone(str(MEMORY))


def test_a_supervisor_whose_caller_has_died_already_runs_nothing() -> None:
    program = b"print('ran')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", supervisor.__file__, "5", "5", str(MEMORY), "0", str(os.getppid())],
        input=f"{len(program)} 0 /tmp\n".encode() + program,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_no_other_process_can_be_killed(level: Isolation, bystander: subprocess.Popen) -> None:
    program = f"""
import os, signal
for kill, process in (
    (os.kill, {bystander.pid}), (os.kill, {os.getpid()}), (os.kill, os.getppid()), (os.killpg, {os.getpgid(0)})
):
    if process:
        try:
            kill(process, signal.SIGKILL)
        except OSError:
            continue
        raise AssertionError(f"killed {{process}}")
"""
    verdict = run_program(program)
    assert verdict.passed, verdict.reason
    run_program(
        "import os, signal\nos.kill(-1, signal.SIGKILL)"
    )  # all that it may kill: as a spare user its tests, too
    assert bystander.poll() is None


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import gc; gc.get_objects()", "PermissionError: gc.get_objects is refused"),
        ("import gc, os; gc.get_referents(os)", "PermissionError: gc.get_referents is refused"),
        ("import ctypes; ctypes.string_at(id(0), 16)", "ImportError: ctypes is refused"),
        ("import _ctypes", "ImportError: _ctypes is refused"),
    ],
)
def test_memory_is_out_of_reach_of_plain_python(level: Isolation, statement: str, reason: str) -> None:
    assert run_program(statement).reason.startswith(f"failed: {reason}")


def test_tracing_cannot_jump_over_the_tests(level: Isolation) -> None:
    program = """import sys
def trace(frame, event, argument):
    if event == "line" and frame.f_lineno == 8:
        frame.f_lineno = 10
    return trace
sys._getframe().f_trace = trace
sys.settrace(trace)
begin = True
assert not begin, "the tests of the program"
end = True
"""
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True)
    assert bare.returncode == 0, "outside the sandbox the attack works"
    assert "sys.settrace is refused" in run_program(program).reason


def test_verdicts_keep_the_order_of_programs(level: Isolation) -> None:
    programs = [f"import time\ntime.sleep({0.2 if i == 0 else 0})\nassert {i} % 3" for i in range(12)]
    start = time.monotonic()
    verdicts = run_programs(programs, workers=2)
    assert [verdict.passed for verdict in verdicts] == [bool(i % 3) for i in range(12)]
    assert time.monotonic() - start < 5
    assert run_programs([]) == []


def test_the_folder_of_a_run_is_removed(level: Isolation, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(open_folder))
    assert run_program("with open('left', 'w') as file: file.write('x')").passed
    assert os.listdir(open_folder) == []


@pytest.mark.parametrize(
    "hostile",
    [
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
        "import os\nos._exit(0)",
        "import os\nos.closerange(0, 256)",
        "import os\nos.write(1, b'14\\n1 0.000 passed' * 9)\nraise SystemExit",
        "import os\nfor i in range(3, 64):\n    try:\n        os.write(i, b'14\\n1 0.000 passed')\n    except OSError:\n        pass\nos._exit(0)",
        "import sys\nwhile True:\n    sys.stdout.write('x' * 65536)\n    sys.stderr.write('x' * 65536)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nraise SystemExit",
        "x = bytearray(2**40)",
        "(" * 10_000,
        "\ud800",
    ],
)
def test_a_hostile_program_changes_no_neighbours_verdict(level: Isolation, hostile: str) -> None:
    """All share one supervisor; each of the others tells whether it was judged by its own end."""
    mark = f"# {time.monotonic()}\n"  # so that no verdict is known already
    good = [f"{mark}assert {i} == {i}" for i in range(4)]
    bad = [f"{mark}assert {i} == {i + 1}" for i in range(4)]
    programs = [
        good[0],
        bad[0],
        mark + hostile,
        good[1],
        bad[1],
        hostile + "\n" + mark,
        good[2],
        bad[2],
        good[3],
        bad[3],
    ]
    verdicts = [v.passed for v in run_programs(programs, workers=1, processor_seconds=1.0, memory_bytes=MEMORY)]
    assert [verdicts[i] for i in (0, 3, 6, 8)] == [True] * 4
    assert [verdicts[i] for i in (1, 4, 7, 9)] == [False] * 4
    assert wait_until_gone(str(MEMORY))


def test_equal_programs_run_once_and_those_again_that_ran_out_of_wall_time(
    level: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    judge = sandbox._Supervisor.judge

    def spy(supervisor: sandbox._Supervisor, job: sandbox.Job) -> Verdict:
        judged.append(job[0])
        return judge(supervisor, job)

    monkeypatch.setattr(sandbox._Supervisor, "judge", spy)
    mark = f"# {time.monotonic()}\n"
    quick, busy, slow = f"{mark}assert 1", f"{mark}while True: pass", f"{mark}import time\ntime.sleep(60)"
    limits = {"processor_seconds": 0.05, "wall_seconds": 0.7}
    first = run_programs([quick, busy, slow, quick, quick], **limits)
    assert sorted(judged) == sorted([quick, busy, slow])
    assert [verdict.passed for verdict in first] == [True, False, False, True, True]
    again = run_programs([quick, busy, slow], **limits)
    assert sorted(judged) == sorted([quick, busy, slow, slow])
    assert again[:2] == first[:2]
    run_programs([quick], processor_seconds=0.3)  # under other limits the verdict may be another one
    assert judged.count(quick) == 2


def test_only_the_latest_verdicts_are_kept() -> None:
    kept, way = sandbox._Verdicts(2), (Limits(), True)
    for program in ("a", "b", "c"):
        kept.keep({(program, "tests"): Verdict(True, "passed", 0.1)}, way)
    assert kept.recall(("a", "tests"), way) is None
    assert kept.recall(("c", "tests"), way) == Verdict(True, "passed", 0.1)
    assert kept.recall(("c", "others"), way) is None
    assert kept.recall(("c", "tests"), (Limits(processor_seconds=2.0), True)) is None
