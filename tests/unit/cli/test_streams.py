"""Streams that are closed, full or read by nobody, and what else goes wrong before a command begins."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m anchorctx"


def shell(line: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, **how)  # type: ignore[call-overload]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_without_its_streams(closed: str, tmp_path: Path) -> None:
    plan = f"{COMMAND} plan out_dir={tmp_path} gpus=1 row_length=128 model.dtype=bfloat16"
    model = "{model_type: llama, hidden_size: 64, num_attention_heads: 4, num_hidden_layers: 2, vocab_size: 64}"
    done = shell(f"{plan} 'model.config={model}' {closed}")
    assert done.returncode == 0 and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text().startswith("{")  # nothing was printed into it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(("line", "code"), [("--help 2>/dev/full", 0), ("reprot 2>/dev/full", 2)])
def test_a_log_on_a_full_disk_ends_nothing(line: str, code: int) -> None:
    assert shell(f"{COMMAND} {line}").returncode == code
    assert shell(f"{COMMAND} {line} >/dev/full").returncode == 2
    done = shell(f"{COMMAND} --version >/dev/full")
    assert done.stderr.count("\n") == 1 and "cannot be written: the disk is full" in done.stderr


def test_nobody_reads_the_help() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND.split(), "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd gone; rmdir ../gone; {COMMAND} train --show", cwd=tmp_path)
    sentence = "anchorctx train: the folder in which you started it is gone: change into one that exists"
    assert done.returncode == 2 and done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_an_interrupt_while_the_package_is_imported_is_silent() -> None:
    code = """if True:
        import os, signal, sys
        class Importing:
            def find_spec(self, name, *_):
                if name == "anchorctx.cli.main":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Importing())
        import anchorctx.__main__
        anchorctx.__main__.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_too_many_open_files(tmp_path: Path) -> None:
    """Whether the number is in the error, in a text, or in the error that it came of."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for error in ("OSError(24, 'x')", "ImportError('lib.so: Too many open files')"):
        code = f"""if True:
            from anchorctx.cli import commands, main
            def run(*_):
                try:
                    raise {error}
                except Exception:
                    raise RuntimeError('something else')
            commands.run = run
            raise SystemExit(main.main(['doctor']))
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        sentence = f"anchorctx doctor: more files are open at once than `ulimit -n`={limit} allows: raise it"
        assert done.returncode == 2 and done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_a_sentence_begins_below_a_bar() -> None:
    code = """if True:
        from tqdm import tqdm
        from anchorctx.cli import commands, main
        def run(*_):
            bar = tqdm(total=3)
            bar.update(1)
            open('/nowhere/at all')
        commands.run = run
        raise SystemExit(main.main(['doctor']))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "\nanchorctx doctor: /nowhere/at all: No such file" in done.stderr
