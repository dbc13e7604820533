"""Time to first token when agents reuse each other's KV caches, in the geometry of KVCOMM's own figures.

Five fully connected agents share a question of 1,024 tokens behind fixed prefixes of 512; each answer is 512 tokens and
is given, so that all arms have the same words. A small random Llama runs every arm on every request, in turns, on a CPU
unless `--device cuda --dtype bfloat16` say otherwise (`scripts/gpu` does it with Llama-3.1-8B's shape). The paper
(arXiv 2510.12872: Llama-3.1-8B, one H100) reports 7.8x for the fifth agent and 4.5x for the request.

  floor      the last token's forward over a full cache of that length: what no reuse can undercut
  offsets    one pass over the exemplars' offsets, which `kvcomm` cannot avoid

Both are measured here. On a CPU, other than on a GPU, recomputed tokens are not free (20 cost two and a half times what
one does), so `rotate_glue` recomputes one token of each content here; `--first` changes that. All hidden work (base KV
of texts, matching, keeping messages, upkeep of the pool) is in every figure; encoding the fixed prefixes once a session
is not, for any arm. `kvcomm` is timed without its gate (kvcomm_ungated), whose verdict depends on texts, and random
ones resemble nothing.

A second part looks for the crossover: two agents with short prefixes share a text of growing length.
Writes a JSON file and a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from anchorctx.evals.evaluators.reuse.config import CopyTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Team
from anchorctx.evals.evaluators.reuse.tasks.copy import CopyTask
from anchorctx.kvcomm import grouped
from anchorctx.kvcomm.arms.basic import Anchored, Arm, Dense, DensePrefixCache, Naive, Rotate, RotateGlue
from anchorctx.kvcomm.arms.offsets import KvcommUngated, MeanOffset
from anchorctx.kvcomm.arms.pool import PoolConfig
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.request import now
from anchorctx.kvcomm.session import Session
from anchorctx.kvcomm.turn import Turn
from anchorctx.records.manifest import build_manifest, write_json
from anchorctx.testing.tiny import word_tokenizer

PAPER = {"last": 7.82, "request": 4.50}
"""Speed-ups that the paper reports, for the fifth agent and for the whole request."""
VOCABULARY = 2048
"""Tokens that the requests are drawn from; a model may have more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; lengths in tokens."""

    agents: int
    question: int
    prefix: int
    output: int
    rounds: int
    exemplars: int
    first: int
    hidden: int
    layers: int
    lengths: tuple[int, ...]
    seed: int
    device: str
    dtype: str


def main() -> None:
    """Measure, print the tables, write JSON and picture."""
    settings, out = parse_arguments()
    manifest = build_manifest("benchmarks/kvcomm", dataclasses.asdict(settings), threads=torch.get_num_threads())
    decoder = Decoder(random_model(small_llama(settings), settings))
    result = measure(settings, decoder)
    crossover = measure_crossover(settings, decoder)
    print(report(settings, result, crossover))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kvcomm_{torch.device(settings.device).type}.json"
    write_json(path, {"manifest": manifest, **result, "crossover": crossover})
    draw(settings, result, crossover, path.with_suffix(".png"))
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


def parse_arguments() -> tuple[Settings, Path]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--question", type=int, default=1024, help="tokens of the shared question (default 1024)")
    parser.add_argument("--prefix", type=int, default=512, help="tokens of each agent's fixed prefix (default 512)")
    parser.add_argument("--output", type=int, default=512, help="tokens of each answer (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed requests, after those that fill the pools")
    parser.add_argument("--exemplars", type=int, default=4, help="exemplars in the pool; as many requests fill it")
    parser.add_argument("--first", type=int, default=1, help="rotate_glue: recomputed tokens of each content")
    parser.add_argument("--hidden", type=int, default=512, help="the model's width; heads of 64, 2 key heads")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights and KV")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    a = parser.parse_args()
    if a.rounds < 1 or a.exemplars < 1 or a.agents < 2:
        parser.error("--rounds and --exemplars must be at least 1, --agents at least 2")
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.quick:
        a.question, a.prefix, a.output, a.hidden, a.layers, a.lengths = 64, 32, 16, 128, 2, [16, 64]
        a.rounds, a.exemplars, a.agents = 1, 2, 3
    a.lengths = tuple(a.lengths)
    return Settings(*(getattr(a, field.name) for field in dataclasses.fields(Settings))), a.out


def small_llama(settings: Settings) -> LlamaConfig:
    """Of the width and depth that were asked for."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        bos_token_id=1,
        eos_token_id=None,
    )


def random_model(config: LlamaConfig, settings: Settings) -> PreTrainedModel:
    """A random Llama, drawn where it runs: time does not depend on the weights."""
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).eval()
    model.set_attn_implementation(grouped.register())
    return model


def arms(settings: Settings) -> dict[str, Callable[[], Arm]]:
    """All arms; pools as large as the requests that fill them."""
    pool = PoolConfig(min_exemplars=settings.exemplars, max_exemplars=settings.exemplars)
    return {
        "dense": Dense,
        "dense_prefix_cache": DensePrefixCache,
        "naive": Naive,
        "rotate": Rotate,
        "rotate_glue": lambda: RotateGlue(settings.first),
        "kvcomm_ungated": lambda: KvcommUngated(pool),
        "mean_offset": lambda: MeanOffset(settings.exemplars),
        "anchored": Anchored,
    }


def session(decoder: Decoder, team: Team, arm: Arm) -> Session:
    """One arm's, with its fixed prefixes encoded."""
    tokenizer = word_tokenizer(VOCABULARY)
    made = Session(decoder.model, tokenizer, team.agents, arm=arm, topology=team.topology, decoder=decoder)
    made.prepare()
    return made


def copy_team(settings: Settings, agents: int, problems: int, **lengths: int) -> Team:
    """Requests of given lengths."""
    config = CopyTaskConfig(problems=problems, **lengths)
    return CopyTask(config, agents, "full", VOCABULARY, settings.seed).teams()[0]


# -- the paper's geometry ---------------------------------------------------------------------------------------------


def measure(settings: Settings, decoder: Decoder) -> dict:
    """Seconds of every arm, agent and round, with the floor of the last agent."""
    lengths = {"question": settings.question, "prefix": settings.prefix, "output": settings.output}
    team = copy_team(settings, settings.agents, settings.exemplars + settings.rounds, **lengths)
    sessions = {name: session(decoder, team, make()) for name, make in arms(settings).items()}
    warm = [p for name in ("kvcomm_ungated", "mean_offset") for p in [name] * settings.exemplars]
    seconds: dict[str, list[list[float]]] = {name: [] for name in sessions}
    parts: dict[str, dict[str, float]] = {}
    floors, passes = [], []
    with tqdm(total=len(warm) + settings.rounds * len(sessions), desc="requests", unit="request") as bar:
        for number, name in enumerate(warm):
            ask(sessions[name], team, number % settings.exemplars)
            bar.update()
        turns: list[Turn] = []
        for number in range(settings.exemplars, settings.exemplars + settings.rounds):
            for name, own in sessions.items():
                turns = ask(own, team, number)
                seconds[name].append([turn.ttft for turn in turns])
                parts[name] = turns[-1].seconds
                bar.update()
            floors.append(floor_seconds(decoder, turns[-1]))
            passes.append(offset_seconds(sessions["kvcomm_ungated"], turns[-1]))
    kept = {name: own.arm.nbytes for name, own in sessions.items()}
    return {
        "ttft_seconds": seconds,
        "floor_seconds": floors,
        "offset_pass_seconds": passes,
        "parts_of_last_agent": parts,
        "kept_bytes": kept,
    }


def ask(own: Session, team: Team, number: int) -> list[Turn]:
    """One request; every answer is given. A buffer is dropped before the next agent's is made."""
    problem = team.problems[number]
    request, turns = own.start(problem.texts), []
    assert problem.script is not None
    for name in team.topology.order:
        turns.append(request.run(name, answer=problem.script[name]))
    return turns


def floor_seconds(decoder: Decoder, turn: Turn, repeats: int = 5) -> float:
    """The least of some forwards of the prompt's last token over its full cache."""
    last = turn.prompt.length - 1
    ids = decoder.tensor([turn.prompt.ids[-1]])
    token = range(last, last + 1)
    return min(timed(lambda: decoder.forward(ids, turn.buffer, token), decoder.device) for _ in range(repeats))


def offset_seconds(own: Session, turn: Turn, repeats: int = 3) -> float:
    """The least of some passes over the offsets of all the contents that the last agent reads."""
    assert isinstance(own.arm, KvcommUngated)
    work = []
    for segment in turn.prompt.placeholders:
        assert segment.name is not None
        held = own.arm.pool.held(segment.name)
        offsets = [e.offsets[turn.agent, segment.occurrence].text.cut(0, segment.length) for e in held]
        work.append((turn.buffer.kv(segment.start, segment.stop), offsets))

    def run() -> None:
        for kv, offsets in work:
            dataclasses.replace(kv, rotated_at=None).weighted_sum(offsets, [1 / len(offsets)] * len(offsets))

    return min(timed(run, own.decoder.device) for _ in range(repeats))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is done."""
    began = now(device)
    run()
    return now(device) - began


# -- crossover --------------------------------------------------------------------------------------------------------


def measure_crossover(settings: Settings, decoder: Decoder) -> dict:
    """Median TTFT of a request of two agents that share one text, by its length, and where each arm begins to win."""
    chosen = ("dense", "dense_prefix_cache", "rotate", "rotate_glue")
    medians: dict[str, list[float]] = {name: [] for name in chosen}
    for length in tqdm(settings.lengths, desc="crossover", unit="length"):
        team = copy_team(settings, 2, 6, question=length, prefix=32, output=1)
        sessions = {name: session(decoder, team, arms(settings)[name]()) for name in chosen}
        found: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(6):
            for name, own in sessions.items():
                found[name].append(sum(turn.ttft for turn in ask(own, team, number)))
        for name in chosen:
            medians[name].append(statistics.median(found[name][1:]))
    wins = {
        base: {name: crossover_length(settings.lengths, medians[base], medians[name]) for name in chosen[2:]}
        for base in chosen[:2]
    }
    return {"lengths": list(settings.lengths), "seconds": medians, "crossover_tokens": wins}


def crossover_length(lengths: tuple[int, ...], dense: list[float], other: list[float]) -> int | None:
    """The shortest measured length from which on the arm is always faster than dense; None when it never is."""
    faster = [o < d for d, o in zip(dense, other, strict=True)]
    return next((n for i, n in enumerate(lengths) if all(faster[i:])), None)


# -- report -----------------------------------------------------------------------------------------------------------


def summary(result: dict) -> dict[str, dict[str, float]]:
    """By arm: medians over the rounds of the last agent's and the request's seconds, and ratios within a round."""
    seconds = {name: np.array(rows) for name, rows in result["ttft_seconds"].items()}
    found = {}
    for name, own in seconds.items():
        row = {"last": float(np.median(own[:, -1])), "request": float(np.median(own.sum(1)))}
        for base in ("dense", "dense_prefix_cache"):
            row[f"last / {base}"] = float(np.median(seconds[base][:, -1] / own[:, -1]))
            row[f"request / {base}"] = float(np.median(seconds[base].sum(1) / own.sum(1)))
        found[name] = row
    return found


def report(settings: Settings, result: dict, crossover: dict) -> str:
    """The tables in Markdown."""
    rows, n = summary(result), settings.agents
    head = ["arm", f"TTFT agent {n}, ms", "request, ms", f"agent {n} vs dense", "request vs dense"]
    head += [f"agent {n} vs prefix cache", "request vs prefix cache", "kept, MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [name, f"{1e3 * row['last']:.1f}", f"{1e3 * row['request']:.0f}"]
        cells += [f"{row[f'{w} / {b}']:.2f}x" for b in ("dense", "dense_prefix_cache") for w in ("last", "request")]
        cells.append(f"{result['kept_bytes'][name] / 2**20:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    floor, once = (1e3 * statistics.median(result[f"{key}_seconds"]) for key in ("floor", "offset_pass"))
    lines += ["", f"floor of agent {n}: {floor:.1f} ms; one pass over {settings.exemplars} exemplars: {once:.1f} ms"]
    for name, extra in (("rotate_glue", 0.0), ("kvcomm_ungated", once)):
        limit = 2 * floor + extra
        lines.append(f"{name}: {1e3 * rows[name]['last']:.1f} ms, limit {limit:.1f} ms (twice the floor + the pass)")
    for base, wins in crossover["crossover_tokens"].items():
        found = (f"{name} {'never' if n is None else f'from {n} tokens on'}" for name, n in wins.items())
        lines.append(f"faster than {base}: {', '.join(found)}")
    return "\n".join(lines)


def draw(settings: Settings, result: dict, crossover: dict, path: Path) -> None:
    """TTFT by agent beside the crossover."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    for name, rows in result["ttft_seconds"].items():
        medians = 1e3 * np.median(np.array(rows), axis=0)
        left.plot(range(1, len(medians) + 1), medians, marker="o", markersize=4, label=name)
    left.axhline(
        1e3 * statistics.median(result["floor_seconds"]), color="black", linestyle=":", label="floor, last agent"
    )
    left.set(yscale="log", xlabel="agent", ylabel="TTFT, ms (median)", xticks=range(1, settings.agents + 1))
    left.set_title(
        f"{settings.question:,} shared tokens, prefix {settings.prefix}, answers {settings.output}", fontsize=10
    )
    left.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5)
    for name, seconds in crossover["seconds"].items():
        right.plot(crossover["lengths"], [1e3 * s for s in seconds], marker="o", markersize=4, label=name)
    right.set(xscale="log", yscale="log", xlabel="shared text, tokens", ylabel="TTFT of both agents, ms (median)")
    right.set_xticks(crossover["lengths"], [str(n) for n in crossover["lengths"]], fontsize=8)
    right.minorticks_off()
    right.set_title("Two agents: from which length reuse pays", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
