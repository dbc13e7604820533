"""Real training runs in real processes, small enough for a test."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchorctx.data.packed_set import ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.layout import PackedLayout

LENGTH, VOCABULARY = 64, 60
MODEL = (
    # the embeddings and the head have more entries than ZeRO 3's persistence threshold, so that they are partitioned
    "model.config={model_type: llama, vocab_size: 4096, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64}"
)


def make_packed(folder: Path, rows: int, seed: int) -> Path:
    """A packed set of random rows that can be learnt (every other token follows from the one before)."""
    rng = np.random.default_rng(seed)
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2")
    writer = ShardWriter(folder, LENGTH, VOCABULARY, 1)
    for _ in range(rows):
        ids = rng.integers(3, VOCABULARY, LENGTH)
        ids[0], ids[1::2] = 1, (ids[0::2] * 7) % (VOCABULARY - 3) + 3
        cuts = sorted(rng.choice(np.arange(2, LENGTH), rng.integers(1, 6), replace=False).tolist())
        offsets = (0, 1, *cuts, LENGTH)
        weights = np.ones(LENGTH, np.float32)
        weights[list(offsets[:-1])] = 0
        writer.add(Row(ids, weights, PackedLayout(offsets, 1)), documents=len(offsets) - 2)
    tokenizer.save_pretrained(writer.folder / "tokenizer")
    facts = {"fingerprint": f"{seed:012x}", "row_length": LENGTH, "anchor_len": 1, "vocab_size": VOCABULARY}
    writer.close({**facts, "tokenizer_fingerprint": "the-same"})
    return folder


@dataclass
class Launcher:
    """Starts `anchorctx train` under torchrun on one corpus."""

    root: Path

    def __post_init__(self) -> None:
        self.train = make_packed(self.root / "train", rows=24, seed=1)
        self.validation = make_packed(self.root / "validation", rows=5, seed=2)

    def overrides(self, name: str, *overrides: str) -> list[str]:
        return [
            *(MODEL, f"out_dir={self.root / name}"),
            *(f"data.train={self.train}", f"data.validation={self.validation}", f"tokens_per_step={LENGTH * 8}"),
            *("steps=6", "validate_every=3", "optim.lr=0.01", "optim.clip=0.3", *overrides),
        ]

    def command(self, name: str, processes: int, *overrides: str, ours: bool = False) -> list[str]:
        return [*torchrun(processes, ours), "-m", "anchorctx", "train", *self.overrides(name, *overrides)]

    def run(self, name: str, processes: int, *overrides: str) -> Path:
        done = subprocess.run(self.command(name, processes, *overrides), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return self.root / name

    def several(self, processes: int, runs: list[tuple[str, ...]]) -> list[dict]:
        """Exit code and stderr of each run, given as (name, *overrides), all in one start of the processes."""
        commands = json.dumps([self.overrides(*run) for run in runs])
        command = [*torchrun(processes), str(Path(__file__).with_name("several.py")), commands]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240 + 60 * len(runs))
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
        assert len(results) == len(runs), done.stderr[-3000:]
        return results


def torchrun(processes: int, ours: bool = False) -> list[str]:
    """torchrun, or `ours`, which passes exit codes on."""
    module = "anchorctx.cli.torchrun" if ours else "torch.distributed.run"
    return [sys.executable, "-m", module, "--standalone", "--nproc_per_node", str(processes)]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, *names: str) -> np.ndarray:
    """(rows, names) of a run's metrics, nan where a row has none."""
    return np.array([[row.get(name, np.nan) for name in names] for row in metrics(run)])
