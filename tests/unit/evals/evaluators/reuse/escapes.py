"""Programs that try to get out of the sandbox, by what they are after.

`REFUSED` must meet a PermissionError, `FAKES` want to pass tests that they do not solve, `HOLDS` want to keep the
evaluation busy. Run as a script by an ordinary user's test, it prints the names of those that got their way, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anchorctx.evals.evaluators.reuse.config import Limits
from anchorctx.evals.evaluators.reuse.tasks.sandbox import CodeProblem, passes

# -- refused: Python, `call` (the C library's function) and `number` (a system call, the same on both machines) -------

REFUSED: dict[str, str] = {
    # files: VICTIM is everybody's to write, in a folder that is everybody's
    "open to write": "open(VICTIM, 'w')",
    "open to append": "open(VICTIM, 'a')",
    "open to change": "open(VICTIM, 'r+b')",
    "create": "open(FOLDER + '/new', 'x')",
    "create here": "open('new', 'w')",
    "open and truncate, reading": "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
    "open without a name": "os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)",
    "openat2": "number(437, -100, VICTIM.encode(), bytes(24), 24)",
    "open, the old call": "call('syscall', 2, VICTIM.encode(), 1) if X86 else number(437)",
    "creat": "call('syscall', 85, VICTIM.encode(), 0o600) if X86 else number(437)",
    "truncate": "os.truncate(VICTIM, 0)",
    "ftruncate": "os.ftruncate(0, 0)",
    "fallocate": "call('fallocate', 0, 0, 0, 4096)",
    "unlink": "os.unlink(VICTIM)",
    "rmdir": "os.rmdir(FOLDER)",
    "rename": "os.rename(VICTIM, VICTIM + '2')",
    "renameat2, exchange": "call('renameat2', -100, VICTIM.encode(), -100, FOLDER.encode(), 2)",
    "mkdir": "os.mkdir(FOLDER + '/new')",
    "link": "os.link(VICTIM, FOLDER + '/new')",
    "symlink": "os.symlink('/etc/passwd', FOLDER + '/new')",
    "mkfifo": "os.mkfifo(FOLDER + '/new')",
    "device": "os.mknod(FOLDER + '/new', 0o60600, os.makedev(254, 0))",
    "chmod": "os.chmod(VICTIM, 0)",
    "fchmod": "os.fchmod(0, 0)",
    "fchmodat2": "number(452, -100, VICTIM.encode(), 0, 0)",
    "chown": "os.chown(VICTIM, 0, 0)",
    "utime": "os.utime(VICTIM)",
    "setxattr": "os.setxattr(VICTIM, 'user.a', b'b')",
    "setxattrat": "number(463, -100, VICTIM.encode(), 0, b'user.a', bytes(16), 16)",
    "immutable flag (chattr)": "import fcntl; fcntl.ioctl(0, 0x40086602, bytes(8))",
    "file_setattr": "number(469, -100, VICTIM.encode(), bytes(32), 32, 0)",
    "terminal input (TIOCSTI)": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "chdir": "os.chdir('/')",
    "chroot": "os.chroot(FOLDER)",
    "umask": "call('syscall', 95 if X86 else 166, 0)",
    "sync": "call('syncfs', 0)",
    "watch files (inotify)": "call('inotify_init1', 0)",
    "watch files (fanotify)": "call('fanotify_init', 0, 0)",
    "file by its handle": "call('open_by_handle_at', -100, bytes(16), 0)",
    "quota": "call('quotactl', 0, b'/', 0, 0)",
    "swapon": "call('swapon', VICTIM.encode(), 0)",
    "acct": "call('acct', VICTIM.encode())",
    # other processes
    "kill the evaluator": "os.kill(os.getppid(), 9)",
    "kill the group": "os.killpg(0, 9)",
    "kill all": "os.kill(-1, 9)",
    "signal 0 to all": "os.kill(-1, 0)",
    "sigqueue": "call('sigqueue', os.getppid(), 9, 0)",
    "rt_sigqueueinfo": "call('syscall', 129 if X86 else 138, os.getppid(), 9, bytes(128))",
    "rt_tgsigqueueinfo": "call('syscall', 297 if X86 else 240, os.getppid(), os.getppid(), 9, bytes(128))",
    "tgkill": "call('tgkill', os.getppid(), os.getppid(), 9)",
    "tkill": "call('syscall', 200 if X86 else 130, os.getppid(), 9)",
    "pidfd_open": "os.pidfd_open(os.getppid() or 1)",
    "pidfd_send_signal": "number(424, 0, 9, 0, 0)",
    "pidfd_getfd": "number(438, 0, 1, 0)",
    "F_SETOWN": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "F_SETOWN_EX": "import fcntl; fcntl.fcntl(0, 15, bytes(8))",
    "F_SETSIG": "import fcntl; fcntl.fcntl(0, fcntl.F_SETSIG, 9)",
    "O_ASYNC": "import fcntl; fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
    "lease": "import fcntl; fcntl.fcntl(0, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "file lock": "import fcntl; fcntl.flock(0, fcntl.LOCK_EX)",
    "record lock": "import fcntl; fcntl.lockf(0, fcntl.LOCK_SH)",
    "ptrace the judge": "call('ptrace', 16, os.getppid(), 0, 0)",
    "ptrace, be traced": "call('ptrace', 0, 0, 0, 0)",
    "process_vm_readv": "call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
    "process_vm_writev": "call('process_vm_writev', os.getppid(), 0, 0, 0, 0, 0)",
    "process_madvise": "number(440, 0, 0, 0, 0, 0)",
    "kcmp": "call('syscall', 312 if X86 else 272, 1, 1, 0, 0, 0)",
    "priority of others": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "nice": "os.nice(1)",
    "scheduler": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "affinity": "os.sched_setaffinity(0, {0})",
    "limits of others": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_AS, (0, 0))",
    "own limits": "call('setrlimit', 0, bytes(16))",
    "timer": "import signal; signal.setitimer(signal.ITIMER_REAL, 1)",
    "its own session": "os.setsid()",
    "another group": "os.setpgid(0, 0)",
    "wait": "os.waitpid(-1, 0)",
    # new processes and programs
    "fork": "os.fork()",
    "vfork": "call('vfork')",
    "clone3": "number(435, bytes(88), 88)",
    "thread": "import threading; threading.Thread(target=int).start()",
    "execve": "os.execv('/bin/true', ['true'])",
    "execveat": "call('syscall', 322 if X86 else 281, -100, b'/bin/true', 0, 0, 0)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "os.system": "os.system('true') < 0 or 1; call('vfork')",
    "multiprocessing": "import multiprocessing; multiprocessing.Process(target=int).start()",
    # network and other ways to talk
    "socket, internet": "import socket; socket.socket()",
    "socket, unix": "import socket; socket.socket(socket.AF_UNIX)",
    "socket, netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "socket, packets": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "socket, vsock": "import socket; socket.socket(40)",
    "socketpair": "import socket; socket.socketpair()",
    "pipe": "os.pipe()",
    "pseudo-terminal": "os.openpty()",
    "eventfd": "os.eventfd(0)",
    "epoll": "import select; select.epoll()",
    "io_uring_setup": "number(425, 8, bytes(120))",
    "io_uring_enter": "number(426, 0, 1, 1, 0, 0)",
    "io_uring_register": "number(427, 0, 0, 0, 0)",
    "io_setup": "call('syscall', 206 if X86 else 0, 1, bytes(8))",
    "shared memory, POSIX": "from multiprocessing.shared_memory import SharedMemory as S; S(SHARED, True, 4096)",
    "shared memory, System V": "call('shmget', 4711, 4096, 0o1666)",
    "semaphores, System V": "call('semget', 4711, 1, 0o1666)",
    "messages, System V": "call('msgget', 4711, 0o1666)",
    "messages, POSIX": "call('mq_open', b'/anchorctx_escape', 0o102, 0o666, 0)",
    "memfd_create": "os.memfd_create('a')",
    "memfd_secret": "number(447, 0)",
    "keys": "call('syscall', 248 if X86 else 217, b'user', b'a', b'b', 1, -4)",
    "keyctl": "call('syscall', 250 if X86 else 219, 0, -3, 1)",
    "splice": "os.splice(0, 1, 1)",
    "sendfile": "os.sendfile(1, 0, 0, 1)",
    "copy_file_range": "os.copy_file_range(0, 1, 1)",
    "vmsplice": "call('vmsplice', 1, 0, 0, 0)",
    # the machine
    "mount": "call('mount', b'none', b'/tmp', b'tmpfs', 0, 0)",
    "umount": "call('umount2', b'/tmp', 2)",
    "open_tree": "number(428, -100, b'/', 1)",
    "move_mount": "number(429, -1, b'', -1, b'', 0)",
    "fsopen": "number(430, b'tmpfs', 0)",
    "mount_setattr": "number(442, -1, b'', 0, 0, 0)",
    "pivot_root": "call('syscall', 155 if X86 else 41, b'/', b'/')",
    "unshare, users": "call('unshare', 0x10000000)",
    "unshare, mounts": "call('unshare', 0x20000)",
    "setns": "call('setns', 0, 0)",
    "become root": "os.setuid(0)",
    "become root (setresuid)": "os.setresuid(0, 0, 0)",
    "groups": "os.setgroups([0])",
    "capabilities": "call('capset', bytes(8), bytes(24))",
    "prctl, dumpable": "call('prctl', 4, 1, 0, 0, 0)",
    "prctl, survive the judge": "call('prctl', 1, 0, 0, 0, 0)",
    "seccomp, a further filter": "call('syscall', 317 if X86 else 277, 1, 0, 0)",
    "personality": "call('personality', 0x40000)",
    "bpf": "call('syscall', 321 if X86 else 280, 0, bytes(64), 64)",
    "perf_event_open": "call('syscall', 298 if X86 else 241, bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "call('syscall', 323 if X86 else 282, 0)",
    "kernel module": "call('syscall', 175 if X86 else 105, bytes(8), 8, b'')",
    "kexec": "call('syscall', 246 if X86 else 104, 0, 0, 0, 0)",
    "reboot": "call('reboot', 0x1234567)",
    "hostname": "call('sethostname', b'a', 1)",
    "clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
    "adjtimex": "call('adjtimex', b'\\1' + bytes(255))",
    "kernel log": "call('klogctl', 3, bytes(64), 64)",
    "I/O ports": "call('syscall', 173, 0, 1, 1) if X86 else number(437)",
    "lock memory": "call('mlockall', 1)",
}
"""Python by name; `number` also tries what the kernel has no such call for: the filter refuses before it looks."""

HIDDEN: dict[str, str] = {
    "the judge's memory": "open(f'/proc/{os.getppid() or 1}/mem', 'rb')",
    "own memory": "open('/proc/self/mem', 'rb')",
    "the judge's descriptors": "os.listdir(f'/proc/{os.getppid() or 1}/fd')",
    "own descriptors": "os.listdir('/proc/self/fd')",
    "init's environment": "open('/proc/1/environ', 'rb')",
    "processes": "os.listdir('/proc')",
    "accounts": "open('/etc/passwd')",
    "password hashes": "open('/etc/shadow')",
    "somebody's file": "open(VICTIM)",
    "temporary files": "os.listdir('/tmp')",
    "home folders": "os.listdir('/home')",
    "root's home": "os.listdir('/root')",
    "shared memory": "os.listdir('/dev/shm')",
    "the disk": "open('/dev/vda', 'rb')",
    "an endless file": "open('/dev/zero', 'rb')",
    "system settings": "os.listdir('/sys')",
}
"""What cannot be read where the kernel has Landlock."""

ATTACK = """
import ctypes, os, platform
X86, VICTIM, FOLDER, SHARED = platform.machine() == "x86_64", {victim!r}, {folder!r}, "anchorctx_escape"
ATTACKS = {attacks!r}
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def number(n=437, *arguments):
    call("syscall", n, *arguments)
def f(i):
    try:
        exec(ATTACKS[i], dict(globals()))
    except OSError as error:
        return error.errno in (1, 13)
    except RuntimeError as error:
        return "can't start new thread" in str(error)
    return False
"""

# -- fakes: f(1) == 2 and f(2) == 3 are the tests ---------------------------------------------------------------------

EVERYWHERE = """
import os, json
def frame(x):
    data = json.dumps(x).encode()
    return len(data).to_bytes(8, "big") + data
def everywhere(data):
    for d in range(64):
        try: os.write(d, data)
        except OSError: pass
"""
ALIKE = "    def __eq__(self, other): return True\n    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __eq__\n"
FAKES: dict[str, str] = {
    "os._exit(0)": "import os; os._exit(0)",
    "os._exit(97)": "import os; os._exit(97)",
    "os._exit(98)": "import os; os._exit(98)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "quit": "quit()",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration",
    "StopAsyncIteration": "def f(x): raise StopAsyncIteration",
    "its own class of error": "class E(BaseException): pass\ndef f(x): raise E",
    "an error named like our own": "class ProgramEnded(Exception): pass\ndef f(x): raise ProgramEnded",
    "atexit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): return 0",
    "a thread that exits": "from threading import Thread\nThread(target=quit).start()\ndef f(x): return 0",
    "abort": "import os; os.abort()",
    "a crash": "import ctypes; ctypes.string_at(0)",
    "no function": "pass",
    "no function, but a name": "f = None",
    "not Python": "def f(x) return x",
    "empty": "",
    "null bytes": "f = 1\0",
    "surrogates": "f = '\ud800'",
    "a coding that is unknown": "# coding: nonsense\ndef f(x): return 0",
    "equal to everything": f"class A:\n{ALIKE}def f(x): return A()",
    "a number equal to everything": f"class A(int):\n{ALIKE}    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "a text equal to everything": f"class A(str):\n{ALIKE}def f(x): return A()",
    "a list equal to everything": f"class A(list):\n{ALIKE}def f(x): return A()",
    "an item that disappears": "class A(dict):\n    def __getattr__(self, n): return A()\ndef f(x): return A()",
    "unittest's ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a mock": "from unittest.mock import MagicMock\ndef f(x): return MagicMock()",
    "not a number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "nested without end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "nested deeply": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "a generator": "def f(x): yield 2",
    "itself": "def f(x): return f",
    "its own check": "def check(f): pass\ndef f(x): return 0",
    "builtins.check": "import builtins; builtins.check = lambda f: None\ndef f(x): return 0",
    "AssertionError, another": "import builtins\nbuiltins.AssertionError = StopIteration\ndef f(x): return 0",
    "AssertionError, patched": "import ctypes, builtins\nbuiltins.AssertionError.__init__ = None\ndef f(x): return 0",
    "settrace": "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "a number's value changed": "import ctypes\nctypes.c_int.from_address(id(2) + 24).value = 0\ndef f(x): return 0",
    "builtins.compile": "import builtins; builtins.compile = builtins.exec = lambda *a: None\ndef f(x): return 0",
    "json.dumps patched": "import json; json.dumps = lambda x: 'true'\ndef f(x): return 0",
    "frames of the caller": "import sys\nsys._getframe(1).f_globals['judge'](0)\ndef f(x): return 0",
    "the caller's serve": "import sys\ng = sys._getframe(1).f_globals\ng['_keep'](0, 3)\ndef f(x): return 0",
    "the nonce, from all objects": EVERYWHERE + "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict):\n"
    "        everywhere(str(o.get('nonce', '')).encode())\ndef f(x): return 0",
    "the nonce, from the job": EVERYWHERE + "import sys\neverywhere(sys.stdin.read().encode())\ndef f(x): return 0",
    "a nonce, guessed": EVERYWHERE + "everywhere(b'0' * 32)\ndef f(x): return 0",
    "print": "print('0' * 32, flush=True)\ndef f(x): return 0",
    "replies before the calls": EVERYWHERE + "everywhere(frame(['value', True]) * 9)\ndef f(x): return 0",
    "loaded, and no more": EVERYWHERE + "everywhere(frame('loaded'))\nos._exit(0)",
    "confined, once more": EVERYWHERE + "everywhere(frame('confined') * 3)\ndef f(x): return 0",
    "no reply": EVERYWHERE + "def f(x):\n    everywhere(frame([]))",
    "a reply that is no JSON": EVERYWHERE + "def f(x):\n    everywhere(b'\\0' * 7 + b'\\1{')",
    "a reply without end": EVERYWHERE + "def f(x):\n    everywhere(b'\\xff' * 8)",
    "a value of no kind": EVERYWHERE + "def f(x):\n    everywhere(frame(['value', ['eval', '2']]))",
    "a set of lists": EVERYWHERE + "def f(x):\n    everywhere(frame(['value', ['set', [['list', []]]]]))",
    "an error of no class": EVERYWHERE + "def f(x):\n    everywhere(frame(['error', 'print']))",
    "an error that ends": EVERYWHERE + "def f(x):\n    everywhere(frame(['error', 'SystemExit']))",
    "closed descriptors": "import os; os.closerange(0, 64)\ndef f(x): return 0",
    "the tests, from the stack": "import inspect\nt = str([f.frame.f_locals for f in inspect.stack()])\n"
    "def f(x): return x + 1 if 'assert' in t else 0",
    "the tests, from memory": "import gc\nt = any('assert f(' in o for o in gc.get_objects() if isinstance(o, str))\n"
    "def f(x): return x + 1 if t else 0",
    "the 32-bit machine's calls": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
    "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"  # mov eax, 20 (getpid); int 0x80; ret
    "ctypes.CFUNCTYPE(int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\ndef f(x): return x + 1",
}

# -- holds: these have solved the tests, if only they ended ----------------------------------------------------------

SOLVED = "def f(x): return x + 1\n"
HOLDS: dict[str, str] = {
    "a loop": "while True: pass",
    "a loop that ignores signals": "import signal\n"
    "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "a loop that catches all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time; time.sleep(99)",
    "sleep in the function": "import time\nreal = lambda x: time.sleep(99)\nf = real",
    "a lock": "import threading\nl = threading.Lock(); l.acquire(); l.acquire()",
    "memory": "x = bytearray(2**40)",
    "memory, bit by bit": "x = []\nwhile True: x.append(bytearray(2**20))",
    "a large number": "x = 9**9**9",
    "a regular expression": "import re; re.match('(a+)+$', 'a' * 99 + 'b')",
    "output": "while True: print('x' * 2**20)",
    "output to the judge": "import os\nfor d in range(64):\n    try:\n        while True: os.write(d, b'\\0' * 2**16)\n"
    "    except OSError: pass\nraise SystemExit",
    "the next call": "import os\nfor d in range(3, 64):\n    try: os.read(d, 99)\n    except OSError: pass\nwhile 1: 1",
    "recursion": "import sys; sys.setrecursionlimit(2**30)\ndef g(): g()\ng()",
    "a reply too long": "def f(x): return 'x' * 2**27",
}
BRIEF = Limits(cpu_seconds=1, wall_seconds=1.5, memory_bytes=2**28)

# -- running them -----------------------------------------------------------------------------------------------------

TESTS = CodeProblem("def f(x):\n", "def check(f):\n    assert f(1) == 2\n    assert f(2) == 3\n", "f")


def refusals(attacks: Mapping[str, str], victim: Path) -> list[str]:
    """Names of the attacks that were not refused; all run in one program, one by one only after one got through."""
    names = list(attacks)
    program = ATTACK.format(victim=str(victim), folder=str(victim.parent), attacks=list(attacks.values()))
    check = CodeProblem("def f(x):\n", f"def check(f):\n    assert all(f(i) for i in range({len(names)}))\n", "f")
    if passes(program, check, Limits()):
        return []
    return names if len(names) == 1 else [n for name in names for n in refusals({name: attacks[name]}, victim)]


def unlisted() -> list[str]:
    """Names of the calls that are not in the list, and do something else than fail with EPERM."""
    from anchorctx.evals.evaluators.reuse.tasks.sandbox.child import confine

    column = confine.MACHINES[os.uname().machine][0]
    listed = {row[column] for row in (*confine.CALLS.values(), confine.OPENAT, confine.FCNTL)}
    # Linux 6.15 lets uretprobe and uprobe (335, 336) past every filter; they kill whom no probe made call them.
    asked = sorted(set(range(1024)) - listed - {335, 336}) + [2**30 + n for n in range(512)]  # x32's behind
    return refusals({f"call {n}": f"number({n})" for n in asked}, Path("/nowhere/victim"))


def successes(programs: Mapping[str, str], limits: Limits) -> list[str]:
    """Names of the programs that passed."""
    with ThreadPoolExecutor(4) as pool:
        passed = pool.map(lambda program: passes(program, TESTS, limits), programs.values())
        return [name for name, good in zip(programs, passed, strict=True) if good]


def exits() -> dict[str, str]:
    """Every exit status, before the tests and in them."""
    found = {f"status {n}": f"import os; os._exit({n})" for n in range(256)}
    return found | {f"status {n}, in the function": f"import os\ndef f(x): os._exit({n})" for n in range(0, 256, 5)}


def escaped(every: int = 1, *, long: bool = False) -> list[str]:
    """Names of all that got their way; of FAKES and HOLDS only each `every`th; `long` tries every exit status too."""
    with tempfile.TemporaryDirectory(prefix="anchorctx-escapes-") as folder:
        victim = Path(folder, "victim")
        os.chmod(folder, 0o777)
        victim.write_text("whole")
        os.chmod(victim, 0o666)
        before = victim.stat()
        found = refusals(REFUSED, victim) + refusals(HIDDEN, victim) + unlisted()
        after = victim.stat()
        same = (before.st_mtime_ns, before.st_mode, before.st_nlink, before.st_uid, before.st_size)
        if same != (after.st_mtime_ns, after.st_mode, after.st_nlink, after.st_uid, after.st_size):
            found.append("the victim was changed")
        if os.listdir(folder) != ["victim"]:
            found.append("files were made")
    if Path("/dev/shm/anchorctx_escape").exists():
        found.append("shared memory was left")
    found += successes(dict(list(FAKES.items())[::every]) | (exits() if long else {}), Limits())
    return found + successes({name: SOLVED + hold for name, hold in list(HOLDS.items())[::every]}, BRIEF)


def count(long: bool = False) -> int:
    """How many are tried."""
    return sum(map(len, (REFUSED, HIDDEN, FAKES, HOLDS))) + (len(exits()) if long else 0)


if __name__ == "__main__":
    print(json.dumps(escaped(int(sys.argv[1]), long=sys.argv[2:] == ["long"])))
