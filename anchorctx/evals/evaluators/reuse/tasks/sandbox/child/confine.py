"""Takes from this process, for good, what computing does not need: limits, privileges, files, system calls.

`prctl`, Landlock and seccomp's filter are called through ctypes: no package is needed, and no rights.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

NOBODY = 65534
"""The uid and gid instead of root's."""

# -- system calls -----------------------------------------------------------------------------------------------------

# Numbers on x86-64 and aarch64; None where the machine has no such call. What is not here fails with EPERM.
CALLS: dict[str, tuple[int, int | None]] = {
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233),
    # descriptors that are open, and reading files, for imports
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "close": (3, 57),
    "lseek": (8, 62), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    # time, randomness, and what the C library asks about itself
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrandom": (318, 278),
    "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    # locks within this process, its own handlers, its end
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
OPENAT, FCNTL = (257, 56), (72, 25)
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, locks."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of the numbers, and how the kernel names the machine (`AUDIT_ARCH_*`)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""seccomp's actions; REFUSE fails the call with EPERM."""


def instructions(machine: str) -> bytes:
    """The filter in BPF: offsets 0, 4 and 16 + 8 n of its data are the call, the machine and argument n."""
    column, name = MACHINES[machine]
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    # Calls of the 32-bit machine beside this one have other numbers: a process that makes one is killed. x32's have
    # numbers from 2**30 on, of which none is in the list.
    code = [(load, 0, 0, 4), (equal, 1, 0, name), (give, 0, 0, KILL), (load, 0, 0, 0)]
    for number in (numbers[column] for numbers in CALLS.values()):
        if number is not None:
            code += [(equal, 0, 1, number), (give, 0, 0, ALLOW)]
    code += [(equal, 0, 4, OPENAT[column]), (load, 0, 0, 16 + 8 * 2), (any_bit, 0, 1, WRITING)]
    code += [(give, 0, 0, REFUSE), (give, 0, 0, ALLOW)]
    code += [(equal, 0, 1 + 2 * len(FCNTL_COMMANDS), FCNTL[column]), (load, 0, 0, 16 + 8)]
    for command in FCNTL_COMMANDS:
        code += [(equal, 0, 1, command), (give, 0, 0, ALLOW)]
    code.append((give, 0, 0, REFUSE))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def _set_filter() -> bool:
    code = instructions(platform.machine())
    program = _Filter(len(code) // 8, code)
    return _prctl(22, 2, ctypes.cast(ctypes.pointer(program), ctypes.c_void_p).value) == 0  # PR_SET_SECCOMP


# -- files ------------------------------------------------------------------------------------------------------------

READABLE = ("/usr", "/lib", "/lib64", "/opt", "/nix", "/etc/ld.so.cache", "/etc/localtime")
"""What stays readable beside Python's own folders, for shared libraries."""


def _hide_files() -> None:
    """Landlock: only programs' folders can be read, nothing written. A kernel before 5.13 hides nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    everything = ctypes.c_uint64(2**13 - 1)  # all rights of its first version
    rules = libc.syscall(444, ctypes.byref(everything), ctypes.c_size_t(8), 0)  # landlock_create_ruleset
    if rules < 0:
        return
    # Not sys.path, which has the project's folder where it is installed as editable: a file of answers may lie there.
    for path in {*READABLE, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)}:
        with suppress(OSError):
            place = os.open(path, os.O_PATH)
            rights = 4 | (8 if os.path.isdir(path) else 0)  # READ_FILE, READ_DIR
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
            libc.syscall(445, rules, 1, rule, 0)  # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
            os.close(place)
    libc.syscall(446, rules, 0)  # landlock_restrict_self
    os.close(rules)


# -- privileges and limits --------------------------------------------------------------------------------------------


def confine(limits: Mapping[str, Any], unsafe: bool) -> bool:
    """Limit this process; False where it cannot be confined. With `unsafe`, only limits that this system knows."""
    safe = sys.platform == "linux" and platform.machine() in MACHINES
    _limit(limits["cpu_seconds"], limits["memory_bytes"])
    if unsafe:
        return True
    if not safe or _prctl(38, 1):  # PR_SET_NO_NEW_PRIVS, which Landlock and the filter ask for
        return False
    _hide_files()
    if not _drop_privileges():
        return False
    # Not before the uid changed, which sets both back: ends with its parent, and no process may look into it.
    return not _prctl(1, signal.SIGKILL) and not _prctl(4, 0) and _set_filter()


def own_processes() -> None:
    """As root, a PID namespace for the process that is made next; without rights for it nothing changes."""
    if sys.platform == "linux" and os.geteuid() == 0:
        ctypes.CDLL(None).unshare(0x20000000)  # CLONE_NEWPID


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    limits = {"CPU": cpu_seconds, "AS": memory_bytes, "NOFILE": 64}
    limits |= dict.fromkeys(("FSIZE", "CORE", "NPROC", "MEMLOCK", "MSGQUEUE"), 0)
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            with suppress(ValueError, OSError):  # it is lower already, or this system has no such limit
                resource.setrlimit(kind, (value, value))


def _drop_privileges() -> bool:
    """An unprivileged uid instead of root's, and no capabilities; reading alone where it could not even read Python.

    Root of a container may not be free to change its uid: then it goes on without capabilities. False where these stay.
    """
    if os.geteuid() == 0:
        _prctl(8, 1)  # PR_SET_KEEPCAPS, or there were none left to keep CAP_DAC_READ_SEARCH from
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    # Python in /root, which uv and pyenv make: its folders stay readable by CAP_DAC_READ_SEARCH, which writes nothing.
    kept = 0 if os.access(os.__file__, os.R_OK) else 1 << 2
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    sets = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    return ctypes.CDLL(None).capset(header, sets) == 0


def _prctl(option: int, value: int, pointer: int | None = None) -> int:
    words = [ctypes.c_ulong(word) for word in (value, pointer or 0, 0, 0)]
    return int(ctypes.CDLL(None, use_errno=True).prctl(option, *words))
