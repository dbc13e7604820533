"""`anchorctx COMMAND [--recipe RECIPE] [--show] [--dry-run] [key=value ...]`, also `python -m anchorctx COMMAND`."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from anchorctx import interrupt
from anchorctx.cli.streams import drop_output, mend_streams
from anchorctx.errors import InterruptedRun, LostProcesses, UserError
from anchorctx.records.disk import refused_write
from anchorctx.records.table import text_table

logger = logging.getLogger(__name__)

COMMANDS = {
    "prepare": "documents -> tokens -> packed rows, on disk",
    "plan": "memory and time of a run, and the cheapest configuration that fits, before renting a machine",
    "train": "continue a checkpoint's training on packed rows (also: torchrun -m anchorctx train)",
    "export": "a run's checkpoint -> a Hugging Face folder",
    "eval": "perplexity, retrieval, needles, RULER and other lm-eval tasks of Hugging Face folders",
    "precision": "does bfloat16 break RoPE on this checkpoint, and does float32 rotation mend it",
    "kvcomm": "how well agents that run a checkpoint reuse each other's KV caches",
    "plot": "pictures of runs, patterns and evaluations",
    "report": "runs and evaluations -> one HTML file to look at",
    "doctor": "what is installed, which attention backends work here, and how to get the rest",
}

USAGE = """\
anchorctx: long-context training of RoPE language models with AnchorAttention

usage: anchorctx COMMAND [--recipe RECIPE] [--show] [key=value ...]

commands:
{commands}

key=value       Hydra overrides; `anchorctx COMMAND --help` lists every key with its default and meaning
--recipe RECIPE start from a recipe instead of the defaults: a .yaml, or a name such as llama3_8b_128k
--show          print the resolved configuration and stop
--dry-run       prepare: print what there is, and what each packing policy would make of it, and stop;
                eval, precision, kvcomm: print how long it will take, measured on a first piece, and stop

a first run:    bash recipes/quickstart/run.sh
"""

GO_ON = {
    "prepare": "what was tokenised is kept, type the same command to go on",
    "train": "before training began, so that nothing is lost: type the same command again",
    "export": "no folder was left half-written, type the same command again",
    "eval": "what was measured is kept, type the same command to go on",
    "precision": "what was measured is kept, type the same command to go on",
    "kvcomm": "what was measured is kept, type the same command to go on",
}
"""What to do after a command was told to end."""
PATIENCE_S = 3.0
"""Most mistakes meet every process alike. The others wait so long, in seconds, before they repeat what the first one
says: torchrun ends them meanwhile, unless the mistake is theirs alone."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the user typed after the command's name."""

    overrides: list[str]
    recipe: str | None
    show: bool
    help: bool
    dry_run: bool = False


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: its own or 0, 2 for a user's mistake, 3 when other processes were lost.

    Told to end, it is 128 and the signal's number, or 124 after `max_hours`; 141 when nobody reads the output any more.
    """
    mend_streams()
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    return _guarded(command, rest)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, without taking the interpreter apart unless it came to its end by itself.

    DeepSpeed's engine lives, and gloo's threads with it, to the very end. A thread that lets go of a collective's
    tensor while the interpreter ends aborts the process, and torchrun calls a finished run failed. After a mistake
    torchrun is to see the end, and to end the other processes, before they have waited for `PATIENCE_S`.
    """
    drop_output()
    if "deepspeed" not in sys.modules and code not in (2, *interrupt.EXIT_CODES):
        sys.exit(code)
    atexit._run_exitfuncs()  # W&B uploads its last rows there
    drop_output()
    sys.stderr.flush()
    os._exit(code)


def entry() -> NoReturn:
    """The `anchorctx` command."""
    interrupt.end_with_launcher()
    leave(main())


def former_entry(command: str) -> NoReturn:
    """`python -m anchorctx.cli.COMMAND`, which goes on working until 0.2 for train and eval."""
    mend_streams()
    interrupt.end_with_launcher()
    _set_up_logging()
    logger.info("-m anchorctx.cli.%s stops working in 0.2: type -m anchorctx %s instead", command, command)
    leave(main([command, *sys.argv[1:]]))


def _guarded(command: str, argv: list[str]) -> int:
    """Run a command; what ends it early becomes one sentence on stderr."""
    _set_up_logging()
    with interrupt.listening():
        try:
            try:
                return _told(command, argv)
            except Exception:
                if (notice := interrupt.swallowed()) is not None:
                    raise notice from None
                raise
        except (InterruptedRun, KeyboardInterrupt) as error:
            notice = error if isinstance(error, InterruptedRun) else InterruptedRun(interrupt.reason(130), 130)
            if _rank() == 0:
                how = notice.how or GO_ON.get(command, "type the same command again")
                _say(f"anchorctx {command}: {notice.reason}: {how}")
            return notice.code


def _told(command: str, argv: list[str]) -> int:
    """Run a command; a user's mistake becomes one sentence on stderr."""
    try:
        code = _answer(command, argv)
        sys.stdout.flush()
    except UserError as error:
        if (notice := interrupt.swallowed()) is not None:  # reading a model makes a sentence of any error
            raise notice from None
        if _rank() > 0:
            _let_the_first_end()
        _say(f"anchorctx {command}: {error}")
        return 2
    except LostProcesses as error:
        if error.told:
            _let_the_first_end()  # torchrun takes it for the one that failed
        else:
            _say(f"anchorctx {command}: {error}")
        return error.code
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        drop_output()
        return 141  # 128 + SIGPIPE
    except Exception as error:
        _say(f"anchorctx {command}: {_about_a_file(error)}")
        drop_output()
        return 2
    return code


def _answer(command: str, argv: list[str]) -> int:
    """What was asked for: help, the version, or a command."""
    if command in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(text_table(COMMANDS.items(), indent=2))), end="")
        return 0
    if command == "--version":
        from anchorctx import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}': choose {', '.join(COMMANDS)}")
    _check_surroundings()
    from anchorctx.cli.commands import run

    return run(command, parse(argv))


def _about_a_file(error: Exception) -> str:
    """What an error says of a file, or of the disk; others are raised again, since their tracebacks tell more."""
    if _needs_files(error):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"more files are open at once than `ulimit -n`={limit} allows: raise it (ulimit -n 4096)"
    if (refused := refused_write(error)) is not None:
        return str(refused)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"the path {ascii(error.object)} is not UTF-8, and some libraries take no other: rename it"
    raise error


def _check_surroundings() -> None:
    """UserError for a folder that is gone and for places among processes that are no numbers."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the folder in which you started it is gone: change into one that exists (cd)") from error
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if (value := os.environ.get(name)) and not value.isdecimal():
            raise UserError(f"{name}={value} in the environment must be a number, as torchrun sets it: unset {name}")


def _needs_files(error: BaseException | None) -> bool:
    """Whether it is about too many open files, or came of that; the linker and Rust say so in their texts alone."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(sentence: str) -> None:
    """Print it on stderr, below progress bars, which leave their line open where they are cut off."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    print(sentence, file=sys.stderr, flush=True)


def _let_the_first_end() -> None:
    """Wait for torchrun, which ends the other processes after the first."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not interrupt.requested():
        time.sleep(0.05)


def _set_up_logging() -> None:
    # eight processes would say everything eight times
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, format="%(message)s")
    for noisy in ("httpx", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def parse(argv: list[str]) -> Arguments:
    """Split options from overrides."""
    overrides, recipe, rest = [], None, list(argv)
    show = wants_help = dry_run = False
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
        elif word == "--show":
            show = True
        elif word == "--dry-run":
            dry_run = True
        elif word.split("=")[0] == "--recipe":
            recipe = word.partition("=")[2] or (rest.pop(0) if rest else None)
            if recipe is None:
                raise UserError("--recipe needs a name or a file: --recipe llama3_8b_128k")
        elif word.startswith("-"):
            raise UserError(f"unknown option '{word}': options are --help, --recipe RECIPE, --show and --dry-run")
        else:
            overrides.append(word)
    return Arguments(overrides, recipe, show, wants_help, dry_run)


def _rank() -> int:
    value = os.environ.get("RANK", "")
    return int(value) if value.isdecimal() else 0  # empty where a job's template has none


if __name__ == "__main__":
    entry()
