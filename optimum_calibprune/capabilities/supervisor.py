# SPDX-License-Identifier: Apache-2.0
"""Locks up and watches generated programs; `sandbox.py` runs this file as a bare Python that imports nothing of ours.

Arguments: seconds of processor time, seconds by the clock, bytes of memory, 1 for namespaces or 0, the process that starts this
one. Programs with their tests come on standard input, one after another, and for each an answer goes to standard output. Every
program gets a keeper of its own: a fork of this process that leaves for fresh namespaces or picks a spare user, forks the process
that runs the tests and one that runs the program, locks both up, watches what time they use, and kills all that they have
started. So programs share nothing but the start of Python.
Tests and program talk as `remote.py` says. Constants carry their names of the Linux headers in comments; the system calls
without a C wrapper have the same number on every architecture.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType


REPORT, CHANNEL = 3, 4  # file descriptors of a process that is locked up
LOCKED_UP = b"locked up"
MEMORY, PROCESSOR, WALL = b"out of memory", b"out of processor time", b"timed out"  # which limit ended a program
PROCESSES = 8  # of a program and its tests, threads too


def _beside(name: str) -> ModuleType:
    """A module beside this file, loaded by its path: a bare Python finds nothing of ours by name."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


remote, system_calls = _beside("remote"), _beside("system_calls")


def _call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library, and raise OSError where it fails."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*values)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _die_with_parent() -> None:
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _live_no_longer_than(parent: int) -> None:
    """Die with the parent, and at once where it had died before the kernel could be asked for that."""
    _die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


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
    _call(
        "mount", b"none", root + b"/tmp", b"tmpfs", 14, b"mode=1777,size=16m,nr_inodes=1k"
    )  # MS_NOSUID | MS_NODEV | MS_NOEXEC
    os.chroot(root)
    os.chdir("/tmp")


def _enter_folder(folder: str) -> None:
    """Go to the folder and let Landlock close all files but it and the libraries; nothing can be executed from either."""
    os.chdir(folder)
    try:
        version = _call("syscall", 444, None, 0, 1)  # landlock_create_ruleset, LANDLOCK_CREATE_RULESET_VERSION
    except OSError as error:
        raise OSError(f"files stay open, since the kernel has no Landlock ({error.strerror})") from error
    every_right = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    read, execute = 0b1100, 1  # LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR, ..._EXECUTE
    rules = _call("syscall", 444, every_right.to_bytes(8, sys.byteorder), 8, 0)
    for path, rights in [(folder, every_right & ~execute), *((library, read) for library in _libraries())]:
        opened = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _call("syscall", 445, rules, 1, rule, 0)  # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
    _call("syscall", 446, rules, 0)  # landlock_restrict_self


def _refuse_system_calls() -> None:
    """Close the network, and all else that would outlive the program, to this process and those that it starts."""
    steps = system_calls.filter_for(os.uname().machine)
    kept = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("HP", len(steps) // 8, ctypes.addressof(kept))  # struct sock_fprog
    _call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _limit_resources(seconds: float, memory: int) -> None:
    """Limit memory, processor time, processes (threads too), open files and file size."""
    import resource  # Windows has none

    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 2,  # should the keeper see nothing of it
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        ceiling = resource.getrlimit(limit)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(limit, (value, value))


def _drop_privileges(uid: int) -> None:
    """Become the spare user where we are root, give up all capabilities, and die with the keeper."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process of the same user reads or changes this one
    _call("capset", (0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24))  # _LINUX_CAPABILITY_VERSION_3
    _die_with_parent()


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
        _refuse_system_calls()


def _refuse_introspection(event: str, arguments: tuple) -> None:
    """Audit hook that keeps the program from jumping over its tests or searching memory for the secret."""
    refused = {"sys.settrace", "sys.setprofile", "gc.get_objects", "gc.get_referents", "gc.get_referrers"}
    if event in refused or event.startswith("ctypes."):
        raise PermissionError(f"{event} is refused to generated code")
    if event == "import" and "ctypes" in arguments[0]:
        raise ImportError(f"{arguments[0]} is refused to generated code")


def _module(name: str) -> ModuleType:
    """A new module, which takes the place of this one as the main module."""
    module = type(sys)(name)
    sys.modules["__main__"] = sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    return module


def _disarm() -> None:
    """Take away from this process what generated code needs for nothing but mischief."""
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]
    globals().pop("ctypes", None)
    sys.addaudithook(_refuse_introspection)


def _execute(tests: bytes) -> bytes:
    """Run the tests as the main module, with what they use of the program, and return nothing to add to the secret."""
    main, peer = _module("__main__"), remote.Peer(CHANNEL)
    peer.wait()
    main.__dict__.update(remote.names_for(tests.decode("utf-8"), peer))
    exec(compile(tests, "<tests>", "exec", dont_inherit=True), main.__dict__)
    return b""


def _run_tests(tests: bytes) -> None:
    """Run the tests; the secret comes in on file descriptor 0, and the outcome goes out on 3."""
    _disarm()
    try:
        # While the tests run, the secret is on the interpreter's stack alone: no name or object leads to it.
        # No secret comes from a keeper that died before this process could ask to die with it.
        os.write(3, (os.read(0, 16) or os._exit(1)) + _execute(tests))
    except MemoryError:
        os.write(3, MEMORY)
    except BaseException as error:  # SystemExit too: the tests did not reach their end
        os.write(3, f"{type(error).__name__}: {error}"[:400].encode("utf-8", "replace"))


def _serve_program(program: bytes) -> None:
    """Run the program, and then what its tests ask of it. It is not the main module, as in the field's harnesses."""
    _disarm()
    module = _module("program")
    peer = remote.Peer(CHANNEL, module.__dict__)
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        peer.tell(error)
        return
    peer.tell(None)
    peer.serve()


def _kill_all(children: Sequence[int], uid: int, namespaces: bool) -> int:
    """Kill tests and program with all that they have started, and return how the process of the tests, the last one of
    the children, ended: the kernel ends the first process of a namespace when the others have been waited for."""
    for child in children:
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


def _describe(message: bytes, status: int) -> str:
    """Say why a program did not pass."""
    if message in (MEMORY, PROCESSOR, WALL):
        return message.decode()
    if message:
        return "failed: " + message[:1600].decode("utf-8", "replace")
    if os.WIFSIGNALED(status):
        names = {number.value: number.name for number in signal.Signals}  # most real-time signals have none
        return f"failed: killed by {names.get(os.WTERMSIG(status), f'signal {os.WTERMSIG(status)}')}"
    return f"failed: exited with status {os.WEXITSTATUS(status)} before its end"


def _prepare_keeper(folder: str, namespaces: bool, uid: int) -> None:
    """Set up what locking up needs from outside of the process to be locked up."""
    os.umask(0o022)
    if namespaces:
        _enter_namespaces()
    elif os.geteuid() != 0:
        sys.exit("only root can become another user")
    else:
        os.chown(folder, uid, uid)
        _call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _start_locked_up(run: Callable, descriptors: Sequence[int], limits: tuple) -> tuple[int, int]:
    """Start a process that locks itself up and runs; return it and where its reports arrive. It has the descriptors, and
    reports on number 3 of them. Ends this process where the other one could not be locked up."""
    import fcntl  # Windows has none

    arrives, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _lock_up(*limits)
            given = [*descriptors[:REPORT], report, *descriptors[REPORT:]]
            for number, source in enumerate([fcntl.fcntl(source, fcntl.F_DUPFD, 16) for source in given]):
                os.dup2(source, number)
            os.closerange(len(given), 1024)
            os.write(REPORT, LOCKED_UP)
            run()
        except (OSError, ValueError) as error:
            os.write(report, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    os.close(report)
    if (answer := os.read(arrives, len(LOCKED_UP))) != LOCKED_UP:  # a program may have written more by now
        sys.exit((answer + os.read(arrives, 4096)).decode("utf-8", "replace"))
    return child, arrives


def _start(program: bytes, tests: bytes, limits: tuple) -> tuple[int, ...]:
    """Start the tests and the program; return where to send the secret, where the outcome arrives, and the processes, that
    of the tests last.

    The tests come first: in a process namespace no other process can harm the first one, and all end with it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    secrets, send_secret = os.pipe()
    ours, theirs = socket.socketpair()
    run_tests, serve = functools.partial(_run_tests, tests), functools.partial(_serve_program, program)
    testing, outcomes = _start_locked_up(run_tests, (secrets, null, null, ours.fileno()), limits)
    serving, _ = _start_locked_up(serve, (null, null, null, theirs.fileno()), limits)
    for end in (ours, theirs):
        end.close()
    os.close(secrets)
    return send_secret, outcomes, serving, testing


def _used() -> float:
    """Seconds of processor time of all processes below this one, and of those that they have waited for."""
    below: dict[int, list[tuple[int, int]]] = {}  # process -> its children, and their clock ticks
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # from the third on; a name may hold anything
        except OSError:
            continue  # it has just ended
        ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
        below.setdefault(int(fields[1]), []).append((int(process), ticks))
    found, parents = 0, [os.getpid()]
    while parents:
        children = below.get(parents.pop(), [])
        found += sum(ticks for _, ticks in children)
        parents += [child for child, _ in children]
    return found / os.sysconf("SC_CLK_TCK")


def _outcome(outcomes: int, seconds: float, wall: float) -> bytes:
    """What the tests report, or which limit ends them. It is looked up when they can have used up their processor time."""
    end, used = time.monotonic() + wall, 0.0
    at_once = min(os.cpu_count() or PROCESSES, PROCESSES)
    while (left := end - time.monotonic()) > 0:
        if select.select([outcomes], [], [], min(left, max((seconds - used) / at_once, 0.02)))[0]:
            return os.read(outcomes, 4096)
        if (used := _used()) >= seconds:
            return PROCESSOR
    return WALL


def _keep(
    program: bytes, tests: bytes, folder: str, seconds: float, wall: float, memory: int, namespaces: bool
) -> str:
    """Judge one program in a folder that is fresh, and return "passed seconds reason"."""
    uid = _spare_user()
    _prepare_keeper(folder, namespaces, uid)
    send_secret, outcomes, *processes = _start(program, tests, (folder, seconds, memory, namespaces, uid))
    secret, start = os.urandom(16), time.monotonic()
    with contextlib.suppress(
        BrokenPipeError
    ):  # the program, which runs already, has killed its tests: they report nothing
        os.write(send_secret, secret)
    os.close(send_secret)
    message, elapsed = _outcome(outcomes, seconds, wall), time.monotonic() - start
    status = _kill_all(processes, uid, namespaces)
    if not namespaces:  # there the folder is on disk, and only rm copes with a tree of any depth
        os.waitpid(os.posix_spawn("/bin/rm", ["rm", "-rf", "--", folder], {}), 0)
    passed = message == secret
    return f"{int(passed)} {elapsed:.3f} {'passed' if passed else _describe(message, status)}"


def _answer(text: str) -> None:
    """Send one answer: a line with its length in bytes, then itself."""
    answer = text.encode("utf-8", "replace")
    os.write(1, b"%d\n%b" % (len(answer), answer))  # shorter than a pipe holds, so it goes as a whole


def _serve(seconds: float, wall: float, memory: int, namespaces: bool, caller: int) -> None:
    """Answer each request (a line "length length folder", the program, its tests) with "passed seconds reason", or with
    "! reason" where the program could not be isolated."""
    _live_no_longer_than(caller)
    __import__("resource")  # here, so that not every fork loads it
    supervisor = os.getpid()
    while header := sys.stdin.buffer.readline():
        *lengths, folder = header.decode().rstrip("\n").split(" ", 2)
        program, tests = (sys.stdin.buffer.read(int(length)) for length in lengths)
        keeper = os.fork()
        if keeper == 0:
            try:
                _live_no_longer_than(supervisor)
                _answer(_keep(program, tests, folder, seconds, wall, memory, namespaces))
            except SystemExit as error:
                _answer(f"! {error}")
            except Exception as error:  # whatever it is, the program was not judged
                _answer(f"! {type(error).__name__}: {error}")
            finally:
                os._exit(0)
        status = os.waitpid(keeper, 0)[1]
        if status != 0:
            _answer(f"! supervisor ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    _serve(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))
