"""A tiny model, corpus, packed set and run, made once, and the commands under attack, with what each must leave."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks import forks

TIMES = ("seconds", "ttft", "throughput", "speedup", "time", "memory", "bytes", "tokens_per_second", "ms")
"""Words in the names of metrics that differ from run to run."""


@dataclass(slots=True)
class World:
    """Inputs under `folder`; made on first use, and kept."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each command takes here when nothing happens to it."""
    whole: dict[str, str] = field(default_factory=dict)
    """What each command leaves then, as `digest` sees it."""

    def make(self) -> None:
        """Write inputs that are missing, and measure each command."""
        facts = self.folder / "facts.json"
        words = [self.words(name, self.folder / name) for name in ("prepare", "export", "eval", "precision", "kvcomm")]
        if not facts.is_file() or json.loads(facts.read_text())[2] != [*words, TRAINING]:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._inputs()
            for name in ("prepare", "train", *(c for c in COMMANDS if c not in ("prepare", "train"))):
                out = self.folder / name
                done = forks.run(self.words(name, out), self.folder)
                if done.code != 0:
                    raise RuntimeError(f"{name} failed before anything was done to it: {done.text[-2000:]}")
                self.seconds[name], self.whole[name] = done.seconds, digest(name, out)
            facts.write_text(json.dumps([self.seconds, self.whole, [*words, TRAINING]]))
        self.seconds, self.whole, _ = json.loads(facts.read_text())

    def words(self, command: str, out: Path) -> list[str]:
        """The command line that writes to `out`."""
        return COMMANDS[command](self, out)

    @property
    def packed(self) -> Path:
        """The packed set."""
        return next((self.folder / "prepare").glob("*/manifest.json")).parent

    def half_trained(self, out: Path) -> None:
        """A run that was cut off behind its fourth step, with checkpoints of the second and the fourth, at `out`."""
        shutil.copytree(self.folder / "train", out, dirs_exist_ok=True)
        shutil.rmtree(next(out.glob("checkpoints/*6")))

    def _inputs(self) -> None:
        from anchorctx.data.sources.stdlib import train_tokenizer
        from anchorctx.testing.tiny import save, text_model

        tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
        save(text_model(tokenizer, 128), tokenizer, self.folder / "model")
        texts = (f"def f{i}(x):\n    return x + {i}\n\n" * (i % 9 + 2) for i in range(80))
        (self.folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _corpus(world: World) -> str:
    return f"corpus={{path: {world.folder / 'corpus.jsonl'}, format: auto}}"


TRAINING = ["validation_rows=2", "validate_every=0", "tokens_per_step=256", "steps=6", "checkpoint.every=2"]
TRAINING += ["checkpoint.keep_last=3", "optim.lr=0.01", "optim.warmup_steps=1"]


def prepare(world: World, out: Path) -> list[str]:
    """Documents to rows."""
    source = f"sources=[{{path: {world.folder / 'corpus.jsonl'}}}]"
    return ["prepare", f"out_dir={out}", f"tokenizer={world.folder / 'model'}", "row_length=128", source]


def train(world: World, out: Path) -> list[str]:
    """Six steps with three checkpoints, and the loss of the last weights."""
    words = ["train", f"out_dir={out}", f"model.path={world.folder / 'model'}", f"data.train={world.packed}"]
    return [*words, f"data.validation={world.packed}", *TRAINING]


def export(world: World, out: Path) -> list[str]:
    """A Hugging Face folder of the run."""
    return ["export", f"run={world.folder / 'train'}", f"out_dir={out / 'exported'}"]


def evaluate(world: World, out: Path) -> list[str]:
    """Two evaluations in several units."""
    words = [
        "eval",
        f"model={world.folder / 'model'}",
        f"out_dir={out}",
        _corpus(world),
        "evals=[perplexity,retrieval]",
    ]
    return [*words, "perplexity.max_length=64", "retrieval={lengths: [64, 128], rows: 2}"]


def precision(world: World, out: Path) -> list[str]:
    """A small study."""
    words = ["precision", f"model={world.folder / 'model'}", f"out_dir={out}", _corpus(world), "lengths=[32,64]"]
    return [*words, "shifts=[16]", "texts=2", "cost=false"]


def kvcomm(world: World, out: Path) -> list[str]:
    """Two arms on one task."""
    words = ["kvcomm", f"model={world.folder / 'model'}", f"out_dir={out}", _corpus(world), "tasks=[copy]"]
    words += ["copy={problems: 2, question: 20, prefix: 10, output: 4}", "arms=[rotate]", "settings={warmup: 2}"]
    return [*words, "variation={tokens: 8, prefix: 8}", "compare_tokens=2"]


def report(world: World, out: Path) -> list[str]:
    """A page of the run and its evaluation."""
    return ["report", str(world.folder / "train"), str(world.folder / "eval"), f"out={out / 'report.html'}"]


COMMANDS: dict[str, Callable[[World, Path], list[str]]] = {
    "prepare": prepare, "train": train, "export": export, "eval": evaluate, "precision": precision, "kvcomm": kvcomm,
    "report": report,
}  # fmt: skip


# -- what must be there at the end ------------------------------------------------------------------------------------


def digest(command: str, out: Path) -> str:
    """What a finished command left, but for times: equal for two runs that computed the same."""
    if command == "prepare":
        found: Any = {path.name: _sha(path) for path in sorted(out.glob("*/*.npy"))}
    elif command == "train":
        found = trained(out)
    elif command == "export":
        found = {path.name: _sha(path) for path in sorted(out.glob("exported/*.safetensors"))}
    elif command == "report":
        found = (out / "report.html").read_text().rstrip()[-7:]
    else:
        found = results(out)
    return json.dumps(found, sort_keys=True)


def trained(out: Path) -> list[tuple[Any, ...]]:
    """(step, loss, validation loss) of each row; the last is of the final weights."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/loss", "train/grad_norm", "val/loss")
    return [tuple(row.get(name) for name in names) for row in rows]


def results(out: Path) -> list[tuple[str, Any, Any]]:
    """Rows without those of times, in order; a doubled row is there twice."""
    rows = [json.loads(line) for path in sorted(out.rglob("results.jsonl")) for line in path.read_text().splitlines()]
    rows = [row for row in rows if not any(word in row["metric"] for word in TIMES)]
    # of how long something took, though their metrics do not say so
    rows = [row for row in rows if row["context"].get("by") != "seconds" and row["metric"] != "kvcomm_recommendation"]
    return sorted((r["metric"], json.dumps(r["context"].get("model")), repr(r["value"])) for r in rows)


def leftovers(out: Path) -> list[str]:
    """Names of half-written files that a finished command left."""
    names = (str(path.relative_to(out)) for path in out.rglob("*"))
    return [name for name in names if ".partial" in name or ".tmp" in name]


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
