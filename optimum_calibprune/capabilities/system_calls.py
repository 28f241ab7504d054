# SPDX-License-Identifier: Apache-2.0
"""The system calls that the kernel refuses a program that no namespaces hold; `supervisor.py` loads this file, which imports
nothing of ours.

Refused are `socket` of every kind, pairs of sockets that could send to others (`socketpair` of datagrams), `io_uring_setup`,
which does without either, and what makes objects that outlive the program: System V IPC, message queues, keys. A call by the
numbers of another architecture ends the program, and x32's numbers are refused. A filter stays over `fork` and `execve`.
"""

import errno
import struct


# AUDIT_ARCH_ of a machine, its number of socketpair, and those of all that is refused: socket, io_uring_setup, shmget, semget,
# msgget, mq_open, add_key, request_key, keyctl.
MACHINES = {
    "x86_64": (0xC000003E, 53, (41, 425, 29, 64, 68, 240, 248, 249, 250)),
    "aarch64": (0xC00000B7, 199, (198, 425, 194, 190, 186, 180, 217, 218, 219)),
}
X32 = 0x40000000  # __X32_SYSCALL_BIT
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24  # places in struct seccomp_data; low words of arguments
LOAD, AND, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # BPF_LD | BPF_W | BPF_ABS, ...
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO, _KILL_PROCESS
UNIX, STREAM, TYPE = 1, 1, 0xF  # AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK


def filter_for(machine: str) -> bytes:
    """The filter as classic BPF, eight bytes an instruction. Raises `OSError` for a machine whose numbers are not here."""
    if machine not in MACHINES:
        raise OSError(f"system calls can be refused on {' and '.join(MACHINES)}, and this is {machine}")
    architecture, socketpair, refused = MACHINES[machine]
    steps = [(LOAD, ARCHITECTURE), *_unless(architecture, KILL)]
    steps += [(LOAD, NUMBER), (IF_AT_LEAST, X32, 0, 1), (RETURN, REFUSE)]
    for number in refused:
        steps += [(IF_EQUAL, number, 0, 1), (RETURN, REFUSE)]
    steps += _unless(socketpair, ALLOW)
    steps += [(LOAD, FIRST), *_unless(UNIX, REFUSE), (LOAD, SECOND), (AND, TYPE), *_unless(STREAM, REFUSE)]
    steps += [(RETURN, ALLOW)]
    return b"".join(struct.pack("=HBBI", code, *(jumps or (0, 0)), value) for code, value, *jumps in steps)


def _unless(value: int, answer: int) -> list[tuple[int, ...]]:
    """Answer, unless what was loaded is the value."""
    return [(IF_EQUAL, value, 1, 0), (RETURN, answer)]
