"""Time and memory of AnchorAttention on this CPU: forward and backward, against what one would use without it.

For rows of T tokens cut into documents of one length, of twice that length and of log-normal lengths, it times

  anchor      the `cpu` backend under the `anchor` pattern
  documents   the same kernel for the same documents without an anchor: what the anchor costs
  full        `scaled_dot_product_attention`, causal over the whole row
  dense       `scaled_dot_product_attention` with the (T, T) boolean mask that computes the same as `anchor`

in turns, round after round, so that a busy moment of the machine hits all four. Ratios are taken within a round.
Peak memory is measured for growing rows, each in a process of its own. Writes a JSON file and a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.records.manifest import build_manifest, write_json

VARIANTS = ("anchor", "documents", "full", "dense")
MEDIAN_LENGTH, SPREAD = 800, 1.2
"""The log-normal lengths: median in tokens and standard deviation of the logarithm (1 in 100 is beyond 13,000)."""
MIB = 2**20

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    tokens: int
    """Row length T of the timings."""
    document: int
    """Tokens of a document in the first case and in the memory measurement."""
    memory_tokens: tuple[int, ...]
    """Row lengths of the memory measurement."""
    dense_max: int
    """Row length up to which the dense mask's memory is measured; it grows with the square."""
    rounds: int
    heads: int
    head_dim: int
    seed: int


def main() -> None:
    """Measure, print the tables, write JSON and picture."""
    arguments = parse_arguments()
    settings = settings_of(arguments)
    if arguments.probe:
        print(json.dumps(peak_memory(arguments.probe, settings)))
        return
    manifest = build_manifest(
        "benchmarks/attention", {name: getattr(settings, name) for name in Settings.__slots__}, **processor()
    )
    timings = [time_case(name, layout, settings) for name, layout in cases(settings).items()]
    memory = measure_memory(settings)
    print(report(manifest, timings, memory))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = arguments.out / "attention_cpu.json"
    write_json(result, {"manifest": manifest, "timings": timings, "memory": memory})
    draw(manifest, timings, memory, result.with_suffix(".png"))
    print(f"\nwritten: {result} and {result.with_suffix('.png').name}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="row length of the timings (default 16384)")
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document, first case (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all variants, after one to warm up")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of tensors and of the log-normal lengths")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument(
        "--dense-max", type=int, default=16_384, help="longest row whose dense mask is tried for memory"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: to see that it works")
    parser.add_argument("--probe", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round must be timed")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for."""
    tokens, document, memory = arguments.tokens, arguments.document, tuple(arguments.memory_tokens)
    rounds, dense_max = arguments.rounds, arguments.dense_max
    if arguments.quick:
        tokens, document, memory, rounds, dense_max = 1024, 128, (1024, 2048), min(rounds, 2), 2048
    return Settings(tokens, document, memory, dense_max, rounds, arguments.heads, arguments.head_dim, arguments.seed)


# -- layouts and variants ---------------------------------------------------------------------------------------------


def cases(settings: Settings) -> dict[str, PackedLayout]:
    """The timed rows by name."""
    tokens, document = settings.tokens, settings.document
    return {
        f"documents of {document:,}": equal_documents(tokens, document),
        f"documents of {2 * document:,}": equal_documents(tokens, 2 * document),
        f"log-normal, median {MEDIAN_LENGTH}": lognormal_documents(tokens, settings.seed),
    }


def equal_documents(tokens: int, document: int) -> PackedLayout:
    """An anchor of one token, then documents of `document` tokens (the first gives one up to the anchor)."""
    return PackedLayout((0, 1, *range(document, tokens, document), tokens), 1)


def lognormal_documents(tokens: int, seed: int) -> PackedLayout:
    """An anchor of one token, then documents of log-normal lengths up to the row's end, which cuts the last one."""
    generator, offsets = np.random.default_rng(seed), [0, 1]
    while offsets[-1] < tokens:
        length = round(MEDIAN_LENGTH * np.exp(SPREAD * generator.standard_normal()))
        offsets.append(min(offsets[-1] + max(length, 1), tokens))
    return PackedLayout(tuple(offsets), 1)


def attention(variant: str, layout: PackedLayout) -> Attention:
    """The function that `variant` times, (1, H, T, D) each; a mask is built here, outside the timed part."""
    if variant == "full":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    if variant == "dense":
        mask = layout.allowed()
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)
    row = layout if variant == "anchor" else Pattern.intra_doc.apply(layout)
    return lambda q, k, v: attend(q, k, v, (row,), backend="cpu")


def inputs(settings: Settings, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (1, H, T, D), laid out as projections leave them, and the output's gradient."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (1, tokens, settings.heads, settings.head_dim)
    *leaves, gradient = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
    return [leaf.requires_grad_() for leaf in leaves], gradient


# -- time -------------------------------------------------------------------------------------------------------------


def time_case(name: str, layout: PackedLayout, settings: Settings) -> dict:
    """Seconds of every variant and round, after a warm-up round that also compares `anchor` with `dense`."""
    leaves, gradient = inputs(settings, layout.length)
    functions = {variant: attention(variant, layout) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    bar = tqdm(total=(settings.rounds + 1) * len(VARIANTS), desc=name, unit="run")
    outputs = {}
    for number in range(settings.rounds + 1):
        for variant, function in functions.items():
            began = time.perf_counter()
            output = function(*leaves)
            torch.autograd.grad(output, leaves, gradient)
            seconds[variant].append(time.perf_counter() - began)
            if number == 0:
                outputs[variant] = output.detach()
            bar.update()
    bar.close()
    ratio = {
        "full / anchor": ratios(seconds["full"], seconds["anchor"]),
        "dense / anchor": ratios(seconds["dense"], seconds["anchor"]),
        "anchor / documents": ratios(seconds["anchor"], seconds["documents"]),
    }
    return {
        "case": name,
        "tokens": layout.length,
        "documents": layout.num_documents,
        "longest_document": int(np.diff(layout.doc_offsets).max()),
        "score_pairs_of_full": layout.attention_pairs() / PackedLayout((0, layout.length)).attention_pairs(),
        "seconds": {variant: values[1:] for variant, values in seconds.items()},
        "ratios": ratio,
        "max_difference_to_dense": (outputs["anchor"] - outputs["dense"]).abs().max().item(),
    }


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, least and greatest ratio over the rounds, the warm-up left out."""
    each = [a / b for a, b in zip(above[1:], below[1:], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


# -- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(settings: Settings) -> list[dict]:
    """Peak memory of forward and backward over growing rows, each measured in a fresh process."""
    wanted = [(variant, tokens) for tokens in settings.memory_tokens for variant in ("anchor", "dense")]
    wanted = [(variant, tokens) for variant, tokens in wanted if variant == "anchor" or tokens <= settings.dense_max]
    found = []
    for variant, tokens in tqdm(wanted, desc="memory", unit="process"):
        options = {"--probe": variant, "--tokens": tokens, "--document": settings.document, "--seed": settings.seed}
        options |= {"--heads": settings.heads, "--head-dim": settings.head_dim, "--threads": torch.get_num_threads()}
        command = [sys.executable, __file__, *(str(x) for option in options.items() for x in option)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


def peak_memory(variant: str, settings: Settings) -> dict:
    """What one forward and backward adds to this process, at its peak, inputs not counted; reads Linux's /proc."""
    q, k, v = inputs(settings, 16)[0]
    attend(q, k, v, (PackedLayout((0, 16)),), backend="cpu").sum().backward()  # starts threads, loads code
    leaves, gradient = inputs(settings, settings.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    function = attention(variant, equal_documents(settings.tokens, settings.document))
    torch.autograd.grad(function(*leaves), leaves, gradient)
    return {"variant": variant, "tokens": settings.tokens, "peak_mib": (resident("VmHWM") - before) / MIB}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: `VmRSS` resident now, `VmHWM` resident at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# -- report -----------------------------------------------------------------------------------------------------------


def processor() -> dict[str, str | int]:
    """The CPU's name and the number of threads that torch uses."""
    path = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in path.read_text().splitlines() if x.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "threads": torch.get_num_threads()}


def title(manifest: dict) -> str:
    """The machine and what ran on it, in one line."""
    config, cpus = manifest["config"], manifest["machine"]["cpus"]
    return (
        f"{manifest['cpu']}, {cpus} cores, {manifest['threads']} threads, torch {manifest['versions']['torch']}; "
        f"forward + backward, {config['heads']} heads of {config['head_dim']}, float32, {config['rounds']} rounds"
    )


def report(manifest: dict, timings: list[dict], memory: list[dict]) -> str:
    """Both tables in Markdown: medians, and ratios with their range over the rounds."""
    names = list(timings[0]["ratios"])
    head = ["T", "case", "documents", *(f"{variant}, s" for variant in VARIANTS), *names]
    lines = [title(manifest), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in timings:
        medians = [f"{statistics.median(row['seconds'][variant]):.3f}" for variant in VARIANTS]
        spans = [f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in row["ratios"].values()]
        cells = [f"{row['tokens']:,}", row["case"], str(row["documents"]), *medians, *spans]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| T | variant | peak memory, MiB | KiB a token |", "|---|---|---|---|"]
    for row in memory:
        tokens, peak = row["tokens"], row["peak_mib"]
        lines.append(f"| {tokens:,} | {row['variant']} | {peak:,.0f} | {peak * 1024 / tokens:.1f} |")
    return "\n".join(lines)


def draw(manifest: dict, timings: list[dict], memory: list[dict], path: Path) -> None:
    """Bars of seconds by case, and lines of peak memory by row length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for i, variant in enumerate(VARIANTS):
        heights = [statistics.median(row["seconds"][variant]) for row in timings]
        bars = left.bar(np.arange(len(timings)) + (i - 1.5) * 0.2, heights, 0.2, label=variant)
        left.bar_label(bars, fmt="%.2g", fontsize=7)
    left.set_xticks(np.arange(len(timings)), [row["case"] for row in timings], fontsize=8)
    left.set(yscale="log", ylabel="seconds, forward + backward", title=f"T = {timings[0]['tokens']:,}")
    left.legend(fontsize=8)
    for variant in dict.fromkeys(row["variant"] for row in memory):
        rows = [row for row in memory if row["variant"] == variant]
        right.plot([r["tokens"] for r in rows], [r["peak_mib"] for r in rows], marker="o", label=variant)
    right.set(xlabel="row length, tokens", ylabel="peak memory, MiB", ylim=(0, None))
    right.set_xticks(sorted({row["tokens"] for row in memory}))
    right.set_title(f"memory, documents of {manifest['config']['document']:,}")
    right.legend(fontsize=8)
    figure.suptitle(title(manifest), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
