# SPDX-License-Identifier: Apache-2.0
"""Run model-generated Python programs where they can do no harm, and judge whether each ran to its end.

Every program gets a supervisor of its own: a bare Python that imports nothing of ours, forks the process that will
run the program, locks that process up, and kills it with all it has started. Two ways to lock it up, the first that
works on this machine:

1. Namespaces, as root or where the kernel lets users create them: the program is the only process it can see, has no
   network, and sees no files but Python's library (read-only) and a small folder in memory. What it starts ends with
   it, because the kernel ends a process namespace with its first process.
2. As root without the right to create namespaces (most containers): a spare user id, with Landlock in front of the
   files where the kernel has it. The network stays open, and `Isolation.network` says so. Everything of that user id
   is killed at the end.

As root, both give up root for a spare user id. Without root and without namespaces a program would run as the user,
with the user's files and processes in reach, so it is not run at all.

A pass is a secret that the supervisor sends once the process is locked up, and that comes back only when the program
has ended. It is out of reach of Python code, but no check inside one process can withstand a program that reads its
own memory, nor one that returns objects equal to everything.
"""

import ctypes
import functools
import inspect
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


# Lets a busy machine start and clean up; the supervisor itself enforces the program's own limit.
_GRACE_SECONDS = 20.0
_MEMORY_BYTES = 512 * 2**20
_IMPORTS = "import ctypes, os, select, signal, sys, time"
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
    """Find out, once, how well this machine can isolate a program."""
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
                [sys.executable, "-I", "-S", "-c", _supervisor_source(), *arguments],
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


@functools.cache
def _supervisor_source() -> str:
    """Source of the supervisor: the functions from `_call` on, as importing all of this module would triple its start."""
    own = [value for value in globals().values() if inspect.isfunction(value) and value.__module__ == __name__]
    first = _call.__code__.co_firstlineno
    sources = [inspect.getsource(function) for function in own if function.__code__.co_firstlineno >= first]
    start = "_supervise(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == '1')"
    return "\n\n".join([_IMPORTS, *sources, start])


# From here on: what runs in the supervisor and in the process it locks up. Constants carry their names of the Linux
# headers in comments, and the system calls without a C wrapper have the same number on every architecture.


def _call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library, and raise OSError where it fails."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*values)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _libraries() -> list[str]:
    """Folders that a program needs to import the standard library."""
    candidates = {os.path.dirname(os.path.dirname(os.__file__)), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    return sorted(folder for folder in candidates if os.path.isdir(folder))


def _spare_user() -> int:
    """Pick a user id from a range no system assigns, that no process has now."""
    used = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            used.add(os.stat(f"/proc/{process}").st_uid)
        except FileNotFoundError:
            continue  # it has just ended
    first, count = 60578, 606
    return next(uid for uid in (first + (os.getpid() + i) % count for i in range(count)) if uid not in used)


def _enter_namespaces() -> None:
    """Leave the machine's mounts, processes, network and IPC; an ordinary user needs a user namespace for that."""
    uid, gid = os.geteuid(), os.getegid()
    namespaces = 0x68020000  # CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if uid == 0:
        _call("unshare", namespaces)
        return
    _call("unshare", namespaces | 0x10000000)  # CLONE_NEWUSER
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _enter_empty_root(folder: str) -> None:
    """Make a root of the libraries, read-only, and an empty folder in memory, and go there."""
    root = os.fsencode(folder)
    _call("mount", None, b"/", None, 0x44000, None)  # MS_PRIVATE | MS_REC
    _call("mount", b"none", root, b"tmpfs", 0, b"mode=755,size=1m")
    for library in map(os.fsencode, _libraries()):
        os.makedirs(root + library, exist_ok=True)
        _call("mount", library, root + library, None, 0x5000, None)  # MS_BIND | MS_REC
    os.mkdir(root + b"/tmp")
    read_only = (7).to_bytes(8, sys.byteorder)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    _call("syscall", 442, -1, root, 0x8000, read_only + bytes(24), 32)  # mount_setattr, AT_RECURSIVE
    _call("mount", b"none", root + b"/tmp", b"tmpfs", 6, b"mode=1777,size=16m,nr_inodes=1k")  # MS_NOSUID | MS_NODEV
    os.chroot(root)
    os.chdir("/tmp")


def _enter_folder(folder: str) -> None:
    """Go to the folder and, where the kernel has Landlock, close all files but the folder and the libraries."""
    os.chdir(folder)
    try:
        version = _call("syscall", 444, None, 0, 1)  # landlock_create_ruleset, LANDLOCK_CREATE_RULESET_VERSION
    except OSError:
        return
    every_right = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    read = 0b1100  # LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR
    rules = _call("syscall", 444, every_right.to_bytes(8, sys.byteorder), 8, 0)
    for path, rights in [(folder, every_right), *((library, read) for library in _libraries())]:
        opened = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _call("syscall", 445, rules, 1, rule, 0)  # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("syscall", 446, rules, 0)  # landlock_restrict_self


def _limit_resources(seconds: float, memory: int) -> None:
    """Limit memory, processor time, processes (threads too), open files and file size."""
    import resource  # Windows has none

    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 2,
        resource.RLIMIT_NPROC: 8,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        ceiling = resource.getrlimit(limit)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(limit, (value, value))


def _drop_privileges(uid: int) -> None:
    """Become the spare user where we are root, give up all capabilities, and die with the supervisor."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("capset", (0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24))  # _LINUX_CAPABILITY_VERSION_3
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _lock_up(folder: str, seconds: float, memory: int, namespaces: bool, uid: int) -> None:
    """Lock up the process that will run the program."""
    os.setsid()
    os.environ.clear()  # Python itself sets LC_CTYPE where it finds no locale
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should memory run out nevertheless, the program goes first
    _limit_resources(seconds, memory)
    if namespaces:
        _enter_empty_root(folder)
        _drop_privileges(uid)
    else:
        _drop_privileges(uid)
        _enter_folder(folder)


def _refuse_introspection(event: str, arguments: tuple) -> None:
    """Audit hook that keeps the program from jumping over its tests or searching memory for the secret."""
    refused = {"sys.settrace", "sys.setprofile", "gc.get_objects", "gc.get_referents", "gc.get_referrers"}
    if event in refused or event.startswith("ctypes."):
        raise PermissionError(f"{event} is refused to generated code")
    if event == "import" and "ctypes" in arguments[0]:
        raise ImportError(f"{arguments[0]} is refused to generated code")


def _execute(program: bytes) -> bytes:
    """Run the program as the main module and return nothing to add to the secret."""
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["program.py"]
    exec(compile(program, "<program>", "exec", dont_inherit=True), main.__dict__)
    return b""


def _attempt(program: bytes) -> None:
    """Run the program; the secret comes in on file descriptor 0, and the outcome goes out on 3."""
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]
    del globals()["ctypes"]
    sys.addaudithook(_refuse_introspection)
    try:
        # While the program runs, the secret is on the interpreter's stack alone: no name or object leads to it.
        os.write(3, os.read(0, 16) + _execute(program))
    except MemoryError:
        os.write(3, b"out of memory")
    except BaseException as error:  # SystemExit too: the program did not reach its end
        os.write(3, f"{type(error).__name__}: {error}"[:400].encode("utf-8", "replace"))


def _kill_all(child: int, uid: int, namespaces: bool) -> int:
    """Kill the program with all that it has started, and return how its first process ended."""
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while not namespaces:
        killer = os.fork()
        if killer == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)  # all that this user may kill: the program's processes
            finally:
                os._exit(0)
        os.waitpid(killer, 0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break  # orphans come to the supervisor, so none is left
    return status


def _describe(message: bytes | None, status: int) -> str:
    """Say why a program did not pass."""
    if message is None:
        return "timed out"
    if message == b"out of memory":
        return "out of memory"
    if message:
        return "failed: " + message[:1600].decode("utf-8", "replace")
    if os.WIFSIGNALED(status):
        return f"failed: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"failed: exited with status {os.WEXITSTATUS(status)} before its end"


def _prepare_supervisor(folder: str, namespaces: bool, uid: int) -> None:
    """Set up what locking up needs from outside of the process to be locked up."""
    os.umask(0o022)
    if namespaces:
        _enter_namespaces()
    elif os.geteuid() != 0:
        sys.exit("only root can become another user")
    else:
        os.chown(folder, uid, uid)
        _call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _start(program: bytes, folder: str, seconds: float, memory: int, namespaces: bool, uid: int) -> tuple[int, ...]:
    """Start the process that runs the program; return it, where to send the secret and where the outcome arrives."""
    null = os.open(os.devnull, os.O_RDWR)
    secrets, send_secret = os.pipe()
    outcomes, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _lock_up(folder, seconds, memory, namespaces, uid)
            for source, target in ((secrets, 0), (null, 1), (null, 2), (report, 3)):
                os.dup2(source, target)
            os.closerange(4, 1024)
            os.write(3, b"locked up")
            _attempt(program)
        except (OSError, ValueError) as error:
            os.write(report, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    os.close(secrets)
    os.close(report)
    return child, send_secret, outcomes


def _supervise(folder: str, seconds: float, memory: int, namespaces: bool) -> None:
    """Run the program from standard input, and write "passed seconds reason" to standard output."""
    program, uid = sys.stdin.buffer.read(), _spare_user()
    _prepare_supervisor(folder, namespaces, uid)
    child, send_secret, outcomes = _start(program, folder, seconds, memory, namespaces, uid)
    if (answer := os.read(outcomes, 4096)) != b"locked up":
        sys.exit(answer.decode("utf-8", "replace"))
    secret, start = os.urandom(16), time.monotonic()
    os.write(send_secret, secret)
    os.close(send_secret)
    ready = select.select([outcomes], [], [], seconds)[0]
    message, elapsed = os.read(outcomes, 4096) if ready else None, time.monotonic() - start
    status = _kill_all(child, uid, namespaces)
    if not namespaces:  # there the folder is on disk, and only rm copes with a tree of any depth
        os.waitpid(os.posix_spawn("/bin/rm", ["rm", "-rf", "--", folder], {}), 0)
    passed = message == secret
    reason = "passed" if passed else _describe(message, status)
    sys.stdout.buffer.write(f"{int(passed)} {elapsed:.3f} {reason}".encode())
