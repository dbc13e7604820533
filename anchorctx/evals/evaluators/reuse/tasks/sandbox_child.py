"""The process that runs untrusted code: it limits itself, then executes what it reads from standard input.

A script of its own, started with `python -I`: it imports nothing of the package and never returns to its caller.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

NO_FILTER = 97
DONE = b"anchorctx: the program ended normally\n"
# seccomp's actions: REFUSE fails the call with EPERM, MISSING with ENOSYS.
ALLOW, REFUSE, MISSING, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
THREAD = 0x10000  # clone's flag CLONE_THREAD
# System calls by machine: (audit architecture, refused outright, [(open call, which argument holds its flags)], clone).
# Refused: socket, socketpair, io_uring_*, execve*, fork, vfork, ptrace, process_vm_*, kill, tkill, tgkill, pidfd_*,
# creat, openat2, rename*, unlink*, rmdir, mkdir*, link*, symlink*, truncate, chmod*, chown*, mknod*, mount, setrlimit,
# prlimit64, utime*, setxattr*; opening for writing; clone but for threads. clone3 does not exist here, so that the C
# library makes its threads with clone, whose flags a filter can read.
CLONE3 = 435
MACHINES = {
    "x86_64": (
        0xC000003E,
        [41, 53, 425, 426, 427, 59, 322, 57, 58, 101, 310, 311, 62, 200, 234, 424, 434, 438, 85, 437]
        + [82, 264, 316, 87, 263, 84, 83, 258, 86, 265, 88, 266, 76, 90, 91, 268, 452, 92, 93, 94, 260]
        + [133, 259, 165, 160, 302, 132, 235, 261, 280, 188, 189, 190],
        [(2, 1), (257, 2)],
        56,
    ),
    "aarch64": (
        0xC00000B7,
        [198, 199, 425, 426, 427, 221, 281, 117, 270, 271, 129, 130, 131, 424, 434, 438, 437]
        + [38, 276, 35, 34, 37, 36, 45, 52, 53, 452, 54, 55, 33, 40, 164, 261, 88, 5, 6, 7],
        [(56, 2)],
        220,
    ),
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def instructions(machine: str) -> bytes:
    """The filter in BPF: offsets 0, 4 and 16 + 8 n of its data are the call, the architecture and argument n."""
    architecture, refused, opens, clone = MACHINES[machine]
    load, equal, any_bit, above, give = 0x20, 0x15, 0x45, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL), (load, 0, 0, 0)]
    if machine == "x86_64":
        code += [(above, 0, 1, 0x40000000), (give, 0, 0, KILL)]  # the x32 calls have other numbers
    for number in refused:
        code += [(equal, 0, 1, number), (give, 0, 0, REFUSE)]
    for number, argument in opens:
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, WRITING)]
        code += [(give, 0, 0, REFUSE), (give, 0, 0, ALLOW)]
    code += [(equal, 0, 1, CLONE3), (give, 0, 0, MISSING)]
    code += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 1, 0, THREAD), (give, 0, 0, REFUSE), (give, 0, 0, ALLOW)]
    code.append((give, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def set_filter() -> bool:
    """No new privileges, then the filter; both stay for this process and all that it makes."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        return False
    code = instructions(machine)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero):  # PR_SET_NO_NEW_PRIVS
        return False
    return libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(program), zero, zero) == 0  # PR_SET_SECCOMP


def main() -> None:
    """Limit, read, run, report."""
    settings = dict(word.split("=") for word in sys.argv[1:])
    report = int(settings["report"])
    cpu, memory = int(settings["cpu_seconds"]), int(settings["memory_bytes"])
    source = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not set_filter():
        os._exit(NO_FILTER)
    sys.argv = [""]
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    os.write(report, DONE)
    os._exit(0)


if __name__ == "__main__":
    main()
