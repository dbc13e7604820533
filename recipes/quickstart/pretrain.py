"""Make the quickstart's starting point: a very small Llama that knows contexts of 512 tokens, and its tokenizer.

    python recipes/quickstart/pretrain.py OUT [--seed 0] [--max-seconds 240] [--max-steps 3000] [--layers 2 --width 64]
        [--text-weight 0.1] [--cooldown 80]

It trains a byte-level BPE on the standard library's sources, then 2 layers of width 64 to read the text and to answer
planted facts (anchorctx.data.sources.facts), in plain torch with plain causal attention, and saves a Hugging Face
folder.

Looking a fact up takes two attention layers that work together, which form suddenly or not at all. Found by trial:
- a curriculum: one fact and no text at all, more facts, then text between them; each stage must be mastered before
  the next begins. Four facts in a row of 17 tokens as the first stage stayed at guessing among the stated values for
  the 230 to 550 steps tried (AdamW with several initialisations; Muon with embeddings of 0.02).
- embeddings of unit size. At the usual 0.02, AdamW's first ten steps move them by more than their size.
- Muon for the layers' matrices: it moves all directions of a matrix at once, so that the 64 keys need not be learnt
  one by one. From one fact to two took 92 steps of 1,024 tokens; AdamW took 500 (with matrices started at 0.1), and
  had not finished after 1,000 with embeddings of 0.01 and 512 tokens a step.
Seeds 0, 1, 2, 3 and 5 were tried, and all finished; the first two before the last stage had its cooldown.
It exits with an error if the last stage is not mastered within the limits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from anchorctx.data.sources.facts import TEXT_WEIGHT, FactRows, FactTokens, fact_rows, lines_of
from anchorctx.data.sources.stdlib import StdlibConfig, documents, train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.retrieval import text_stream

MAX_LENGTH = 512
"""Tokens: the longest context of the pretraining."""
STREAM_LINES = 40_000
"""Lines of text to train on: about half a million tokens."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum."""

    length: int
    """Tokens a row."""
    facts: int
    """Facts a row."""
    mentions: int
    """Times each is mentioned."""
    batch_tokens: int
    """Tokens an update."""
    goal: float = 0.96
    """Accuracy to reach ..."""
    batches: int = 5
    """... on average over this many batches in a row."""
    cooldown: int = 0
    """Updates made in any case, over which the learning rates fall to a tenth; 0 keeps them constant."""
    text_weight: float = TEXT_WEIGHT
    """Loss weight of a token of text."""


CURRICULUM = (
    Stage(9, 1, 4, 1024),
    Stage(9, 2, 2, 1024),
    Stage(17, 4, 2, 1024),
    Stage(33, 8, 2, 1024),
    Stage(64, 8, 2, 1024),
    Stage(128, 8, 2, 2048),
    Stage(256, 12, 2, 2048),
    Stage(MAX_LENGTH, 16, 2, 4096, goal=0.97, batches=10, cooldown=80),
)
"""The first four have no text."""


def curriculum(text_weight: float, cooldown: int) -> list[Stage]:
    """`CURRICULUM` with text of another weight, and another number of updates in the last stage's cooldown."""
    if not text_weight >= 0:  # nan is not
        raise UserError(f"--text-weight {text_weight} must be at least 0: an answer weighs 1, text 0.1 by default")
    if cooldown < 1:
        raise UserError(f"--cooldown {cooldown} must be at least 1: it counts the last stage's updates")
    stages = [replace(stage, text_weight=text_weight) for stage in CURRICULUM]
    return [*stages[:-1], replace(stages[-1], cooldown=cooldown)]


class Rows:
    """Endless random rows for a stage: training text with facts planted at line boundaries."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._tokens, self._bos = FactTokens.of(tokenizer), tokenizer.bos_token_id
        lines = [line for document in documents(StdlibConfig()) for line in lines_of(document.text)]
        at = np.linspace(0, len(lines), 41).astype(int)[:-1]  # forty places spread over the corpus
        pieces = ["".join(lines[a : a + STREAM_LINES // 40]) for a in at]
        self._stream, self._line_start = text_stream(pieces, tokenizer)

    def draw(self, stage: Stage) -> FactRows:
        """One batch."""
        text = stage.length - 1 - 2 * stage.facts * stage.mentions
        starts = self._rng.integers(0, len(self._stream) - text, size=(max(stage.batch_tokens // stage.length, 1), 1))
        at = starts + np.arange(text)
        return fact_rows(
            self._rng,
            self._tokens,
            self._bos,  # type: ignore[arg-type]
            self._stream[at],
            self._line_start[at],
            facts=stage.facts,
            mentions=stage.mentions,
        )


HEAD = 32
"""Width of a head."""


def build_model(tokenizer: PreTrainedTokenizerBase, layers: int = 2, width: int = 64) -> LlamaForCausalLM:
    """The small Llama, with embeddings of unit size."""
    if layers < 2 or width < HEAD or width % HEAD:
        raise UserError(
            f"--layers {layers} --width {width} cannot learn to look facts up: give at least 2 layers and a multiple "
            f"of {HEAD} as width"
        )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD,
            max_position_embeddings=MAX_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    rows: FactRows,
    text_weight: float = TEXT_WEIGHT,
    lr_factor: float = 1.0,
) -> float:
    """One update on one batch, in which an answer weighs 1; returns the accuracy of its answers, before the update."""
    ids = torch.from_numpy(rows.ids)
    weights = torch.from_numpy(np.where(rows.answers, 1.0, np.where(rows.text, text_weight, 0.0))[:, 1:]).float()
    scored = weights > 0
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, width)
    logits, labels, weights = model.lm_head(hidden[scored]), ids[:, 1:][scored], weights[scored]
    answers = torch.from_numpy(rows.answers[:, 1:])[scored]
    loss = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor
        optimizer.step()
    return (logits.argmax(-1) == labels)[answers].float().mean().item()


def pretrain(model: LlamaForCausalLM, rows: Rows, stages: Sequence[Stage], max_seconds: float, max_steps: int) -> None:
    """Run a curriculum; raises UserError when it is not finished within the limits."""
    optimizers, start, step = build_optimizers(model), time.perf_counter(), 0
    with tqdm(total=len(stages), desc="pretraining", unit="stage", bar_format=BAR) as bar:
        for number, stage in enumerate(stages, 1):
            recent: deque[float] = deque(maxlen=stage.batches)
            first, tokens, began = step, 0, time.perf_counter()
            while (
                len(recent) < stage.batches or sum(recent) / len(recent) < stage.goal or step - first < stage.cooldown
            ):
                if step >= max_steps or time.perf_counter() - start > max_seconds:
                    raise UserError(
                        f"the model answered {sum(recent) / max(len(recent), 1):.0%} at {stage.length} tokens after "
                        f"{step} steps and {time.perf_counter() - start:.0f} s, short of the {stage.goal:.0%} that "
                        "the next stage needs: raise --max-seconds and --max-steps, or try another --seed"
                    )
                batch = rows.draw(stage)
                fall = min((step - first) / stage.cooldown, 1.0) if stage.cooldown else 0.0
                recent.append(train_step(model, optimizers, batch, stage.text_weight, 1 - 0.9 * fall))
                step, tokens = step + 1, tokens + batch.ids.size
                if step % 5 == 0:
                    rate = tokens / (time.perf_counter() - began)
                    bar.set_postfix_str(
                        f"stage {number}: {stage.length} tokens, answers {sum(recent) / len(recent):.0%}, "
                        f"step {step}, {rate / 1000:.1f}k tok/s"
                    )
            bar.update()


BAR = "{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
"""Stages take unlike times, so the remaining time is an estimate that comes down late."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write the model and tokenizer to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the rows")
    parser.add_argument("--max-seconds", type=float, default=240.0, help="give up after this long")
    parser.add_argument("--max-steps", type=int, default=3000, help="give up after this many updates")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers, at least 2")
    parser.add_argument("--width", type=int, default=64, help=f"of the residual stream, a multiple of {HEAD}")
    parser.add_argument("--text-weight", type=float, default=TEXT_WEIGHT, help="loss weight of text, an answer's is 1")
    parser.add_argument("--cooldown", type=int, default=CURRICULUM[-1].cooldown, help="updates in the last stage")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    try:
        stages = curriculum(options.text_weight, options.cooldown)
        print("training a tokenizer on the standard library's sources ...", flush=True)
        tokenizer = train_tokenizer()
        model = build_model(tokenizer, options.layers, options.width)
        pretrain(model, Rows(tokenizer, options.seed), stages, options.max_seconds, options.max_steps)
    except UserError as error:
        print(f"pretraining failed: {error}", file=sys.stderr)
        return 1
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"wrote {options.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
