# SPDX-License-Identifier: Apache-2.0
"""The filter of system calls, read as the kernel reads it, and in the kernel itself."""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_calibprune.capabilities import supervisor
from optimum_calibprune.capabilities.system_calls import MACHINES, filter_for


REFUSED = ["socket", "io_uring_setup", "shmget", "semget", "msgget", "mq_open", "add_key", "request_key", "keyctl"]
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
STREAM, DATAGRAM, CLOSE_ON_EXEC = 1, 2, 0o2000000


def answer(steps: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter says to a system call: the five kinds of instructions that it has, over `struct seccomp_data`."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    place, loaded = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", steps, 8 * place)
        place += 1
        if code == 0x20:
            loaded = int.from_bytes(data[value : value + 4], "little")
        elif code == 0x54:
            loaded &= value
        elif code in (0x15, 0x35):
            place += if_true if (loaded == value if code == 0x15 else loaded >= value) else if_false
        else:
            assert code == 0x06
            return value


def numbers(machine: str) -> dict[str, int]:
    """The system calls of the kernel's own header."""
    if not HEADERS[machine].is_file():
        pytest.skip(f"needs {HEADERS[machine]}")
    found = re.findall(r"#define __NR_(\w+) (\d+)", HEADERS[machine].read_text())
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize("machine", MACHINES)
def test_of_all_system_calls_those_are_refused_and_no_other(machine: str) -> None:
    steps, architecture, by_name = filter_for(machine), MACHINES[machine][0], numbers(machine)
    refused = {name for name, number in by_name.items() if answer(steps, architecture, number, 2, STREAM) != ALLOW}
    assert refused == {*REFUSED, "socketpair"}
    pair = by_name["socketpair"]
    assert answer(steps, architecture, pair, 1, STREAM | CLOSE_ON_EXEC) == ALLOW
    assert answer(steps, architecture, pair, 1, DATAGRAM | CLOSE_ON_EXEC) == REFUSE
    assert answer(steps, architecture, pair, 30, STREAM) == REFUSE, "TIPC has pairs that reach other machines"
    assert answer(steps, architecture, 0x40000000 | by_name["read"]) == REFUSE
    assert {answer(steps, other, by_name["read"]) for other in (0x40000003, 0x40000028, 0)} == {KILL}


def test_a_machine_whose_numbers_are_not_known_is_refused() -> None:
    with pytest.raises(OSError, match="can be refused on x86_64 and aarch64, and this is riscv64"):
        filter_for("riscv64")


def filtered(code: str) -> subprocess.CompletedProcess:
    """A Python without any other lock that runs the code behind the filter, where it may use ctypes."""
    begin = (
        f"import ctypes, errno, importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('supervisor', {supervisor.__file__!r})\n"
        "lock = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(lock)\n"
        "lock._call('prctl', 38, 1, 0, 0, 0)\nlock._refuse_system_calls()\n"
        "def raised(*call):\n    try:\n        lock._call('syscall', *call)\n"
        "    except OSError as error:\n        return error.errno\n"
    )
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES:
        pytest.skip("a filter for this machine is not known")
    return subprocess.run([sys.executable, "-I", "-S", "-c", begin + code], capture_output=True, text=True)


def test_the_kernel_refuses_them() -> None:
    done = filtered(
        f"refused = {MACHINES[platform.machine()][2]}\nassert {{raised(number, 2, 1, 0) for number in refused}} == {{errno.EPERM}}\n"
        "if os.fork() == 0:\n    os._exit(raised(refused[0], 2, 1, 0))\nassert os.wait()[1] == errno.EPERM << 8\n"
        "code = 'import socket; socket.socket()'\n"
        "assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-I', '-S', '-c', code]) == 1\n"
        "import socket\nsocket.socketpair()"
    )
    assert done.returncode == 0, done.stderr
    assert "PermissionError" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 has other architectures' system calls")
def test_the_kernel_refuses_other_architectures_numbers() -> None:
    x32 = filtered(f"assert raised({0x40000000 | 41}, 2, 1, 0) == errno.EPERM")
    assert x32.returncode == 0, x32.stderr
    code = bytes.fromhex("b867010000 cd80 c3")  # mov eax, 359 (i386's socket); int 0x80; ret
    run = (
        f"import mmap\nmemory = mmap.mmap(-1, 4096, prot=7)\nmemory.write({code!r})\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(memory))\nctypes.CFUNCTYPE(ctypes.c_int)(address)()"
    )
    free = subprocess.run([sys.executable, "-c", f"import ctypes\n{run}"])
    if free.returncode != 0:
        pytest.skip("this kernel has no 32-bit system calls")
    assert filtered(run).returncode == -31, "SIGSYS"
