"""Time and memory of AnchorAttention on this CPU: forward and backward, against what one would use without it.

For rows of T tokens cut into documents of one length, of others, and of log-normal lengths, it times

  plain       the documents alone, without an anchor, and nothing of ours: `q.split`, one causal
              `scaled_dot_product_attention` a document, `torch.cat`
  copies      `attend` over the row with a copy of the anchor in front of each document: what training does
  merge       `attend` with one shared anchor
  full        `scaled_dot_product_attention`, causal over the whole row
  dense       `scaled_dot_product_attention` with the (T, T) boolean mask that computes the same as `merge`

in turns, round after round, so that a busy moment of the machine hits all of them. Ratios are taken within a round.
Where documents are short enough for the merge to pay is measured too, and peak memory for growing rows, each in a
process of its own. Writes a JSON file and a picture.

`copies` was predicted at 1.01 of `plain` (a token more to a document of 1,024, the same writes) and 1.1 at 256.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout
from anchorctx.records.manifest import build_manifest, write_json

VARIANTS = ("plain", "copies", "merge", "full", "dense")
MEDIAN_LENGTH, SPREAD = 800, 1.2
"""The log-normal lengths: median in tokens and standard deviation of the logarithm (1 in 100 is beyond 13,000)."""
MIB = 2**20

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    tokens: int
    """Row length T of the timings."""
    documents: tuple[int, ...]
    """Tokens of a document, a case each; the memory measurement takes the first."""
    short: tuple[int, ...]
    """Tokens of a document where `merge` is compared with `copies`."""
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
    short = [time_short(length, settings) for length in settings.short]
    print(report(manifest, timings, short, memory))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = arguments.out / "attention_cpu.json"
    write_json(result, {"manifest": manifest, "timings": timings, "short": short, "memory": memory})
    draw(manifest, timings, memory, result.with_suffix(".png"))
    print(f"\nwritten: {result} and {result.with_suffix('.png').name}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="row length of the timings (default 16384)")
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[1024, 256, 2048], help="tokens of a document, a case each"
    )
    parser.add_argument("--short", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128], help="merge against copies")
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
    tokens, documents, short = arguments.tokens, tuple(arguments.documents), tuple(arguments.short)
    memory, rounds, dense_max = tuple(arguments.memory_tokens), arguments.rounds, arguments.dense_max
    if arguments.quick:
        tokens, documents, short = 1024, (128, 256), (8, 32)
        memory, rounds, dense_max = (1024, 2048), min(rounds, 2), 2048
    sizes = arguments.heads, arguments.head_dim
    return Settings(tokens, documents, short, memory, dense_max, rounds, *sizes, arguments.seed)


# -- layouts and variants ---------------------------------------------------------------------------------------------


def cases(settings: Settings) -> dict[str, PackedLayout]:
    """The timed rows by name."""
    tokens = settings.tokens
    equal = {f"documents of {length:,}": equal_documents(tokens, length) for length in settings.documents}
    return equal | {f"log-normal, median {MEDIAN_LENGTH}": lognormal_documents(tokens, settings.seed)}


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
    """The function that `variant` times, (1, H, T, D) each; a mask is built here, outside the timed part.

    `copies` takes the row with the copies in it (`tokens_of`).
    """
    if variant == "full":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    if variant == "dense":
        mask = layout.allowed()
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if variant == "plain":
        lengths = np.diff(layout.doc_offsets)[1:].tolist()  # without the anchor
        return lambda q, k, v: documents_alone(q, k, v, lengths)
    row = layout.with_copies()[0] if variant == "copies" else layout
    return lambda q, k, v: attend(q, k, v, (row,), backend="cpu")


def documents_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Causal attention within documents as one writes it in plain torch; (1, H, T, D) each."""
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2)


def tokens_of(variant: str, layout: PackedLayout) -> torch.Tensor:
    """(T',) the row's tokens that the variant's function takes: gathering happens where rows are made, untimed."""
    if variant == "plain":
        return torch.arange(layout.anchor_len, layout.length)
    return torch.from_numpy(layout.with_copies()[1]) if variant == "copies" else torch.arange(layout.length)


def inputs(settings: Settings, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (1, H, T, D), laid out as projections leave them, and the output's gradient."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (1, tokens, settings.heads, settings.head_dim)
    *leaves, gradient = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
    return [leaf.requires_grad_() for leaf in leaves], gradient


# -- time -------------------------------------------------------------------------------------------------------------


def time_case(name: str, layout: PackedLayout, settings: Settings) -> dict:
    """Seconds of every variant and round, and how far `copies` and `merge` are from the dense mask's output."""
    seconds, outputs = in_turns(name, VARIANTS, layout, settings)
    index = tokens_of("copies", layout)
    return {
        "case": name,
        "tokens": layout.length,
        "documents": layout.num_documents,
        "longest_document": int(np.diff(layout.doc_offsets).max()),
        "score_pairs_of_full": layout.attention_pairs() / PackedLayout((0, layout.length)).attention_pairs(),
        "seconds": {variant: values[1:] for variant, values in seconds.items()},
        "ratios": {
            f"{above} / {below}": ratios(seconds[above], seconds[below])
            for above, below in (("copies", "plain"), ("merge", "plain"), ("full", "copies"), ("dense", "copies"))
        },
        "max_difference_to_dense": {
            "copies": (outputs["copies"] - outputs["dense"][:, :, index]).abs().max().item(),
            "merge": (outputs["merge"] - outputs["dense"]).abs().max().item(),
        },
    }


def time_short(length: int, settings: Settings) -> dict:
    """Seconds of `copies` and `merge` over documents of a few tokens."""
    layout = equal_documents(settings.tokens, length)
    seconds, _ = in_turns(f"documents of {length}", ("copies", "merge"), layout, settings)
    found = {variant: values[1:] for variant, values in seconds.items()}
    return {"document": length, "seconds": found, "merge / copies": ratios(seconds["merge"], seconds["copies"])}


def in_turns(
    name: str, variants: Sequence[str], layout: PackedLayout, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Seconds of each variant, forward and backward, round after round, the first to warm up; and its output."""
    leaves, gradient = inputs(settings, layout.length)
    calls = {}
    for variant in variants:
        index = tokens_of(variant, layout)
        taken = [heads_last(x.detach()[:, :, index]).requires_grad_() for x in leaves]
        calls[variant] = attention(variant, layout), taken, heads_last(gradient[:, :, index])
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    outputs = {}
    with tqdm(total=(settings.rounds + 1) * len(variants), desc=name, unit="run") as bar:
        for _ in range(settings.rounds + 1):
            for variant, (function, taken, weights) in calls.items():
                began = time.perf_counter()
                output = function(*taken)
                torch.autograd.grad(output, taken, weights)
                seconds[variant].append(time.perf_counter() - began)
                outputs[variant] = output.detach()
                bar.update()
    return seconds, outputs


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """The same (1, H, T, D), laid out as projections leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, least and greatest ratio over the rounds, the warm-up left out."""
    each = [a / b for a, b in zip(above[1:], below[1:], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


# -- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(settings: Settings) -> list[dict]:
    """Peak memory of forward and backward over growing rows, each measured in a fresh process."""
    wanted = [(variant, tokens) for tokens in settings.memory_tokens for variant in ("copies", "dense")]
    wanted = [(variant, tokens) for variant, tokens in wanted if variant == "copies" or tokens <= settings.dense_max]
    found = []
    for variant, tokens in tqdm(wanted, desc="memory", unit="process"):
        options = {
            "--probe": variant,
            "--tokens": tokens,
            "--documents": settings.documents[0],
            "--seed": settings.seed,
        }
        options |= {"--heads": settings.heads, "--head-dim": settings.head_dim, "--threads": torch.get_num_threads()}
        command = [sys.executable, __file__, *(str(x) for option in options.items() for x in option)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


def peak_memory(variant: str, settings: Settings) -> dict:
    """What one forward and backward adds to this process, at its peak, inputs not counted; reads Linux's /proc."""
    q, k, v = inputs(settings, 16)[0]
    attend(q, k, v, (PackedLayout((0, 16)),), backend="cpu").sum().backward()  # starts threads, loads code
    layout = equal_documents(settings.tokens, settings.documents[0])
    leaves, gradient = inputs(settings, len(tokens_of(variant, layout)))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    function = attention(variant, layout)
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


def report(manifest: dict, timings: list[dict], short: list[dict], memory: list[dict]) -> str:
    """The tables in Markdown: medians, and ratios with their range over the rounds."""
    names = list(timings[0]["ratios"])
    head = ["T", "case", "documents", *(f"{variant}, s" for variant in VARIANTS), *names]
    lines = [title(manifest), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in timings:
        medians = [f"{statistics.median(row['seconds'][variant]):.3f}" for variant in VARIANTS]
        spans = [span(ratio) for ratio in row["ratios"].values()]
        cells = [f"{row['tokens']:,}", row["case"], str(row["documents"]), *medians, *spans]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| tokens of a document | copies, s | merge, s | merge / copies |", "|---|---|---|---|"]
    for row in short:
        copies, merge = (statistics.median(row["seconds"][variant]) for variant in ("copies", "merge"))
        lines.append(f"| {row['document']} | {copies:.3f} | {merge:.3f} | {span(row['merge / copies'])} |")
    lines += ["", "| T | variant | peak memory, MiB | KiB a token |", "|---|---|---|---|"]
    for row in memory:
        tokens, peak = row["tokens"], row["peak_mib"]
        lines.append(f"| {tokens:,} | {row['variant']} | {peak:,.0f} | {peak * 1024 / tokens:.1f} |")
    return "\n".join(lines)


def span(ratio: dict[str, float]) -> str:
    """A ratio and its range over the rounds."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def draw(manifest: dict, timings: list[dict], memory: list[dict], path: Path) -> None:
    """Bars of seconds by case, and lines of peak memory by row length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for i, variant in enumerate(VARIANTS):
        heights = [statistics.median(row["seconds"][variant]) for row in timings]
        bars = left.bar(np.arange(len(timings)) + (i - 2) * 0.16, heights, 0.16, label=variant)
        left.bar_label(bars, fmt="%.2g", fontsize=6)
    left.set_xticks(np.arange(len(timings)), [row["case"].replace(", ", ",\n") for row in timings], fontsize=8)
    left.set(yscale="log", ylabel="seconds, forward + backward", title=f"T = {timings[0]['tokens']:,}")
    left.set_ylim(top=4 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=8, ncols=len(VARIANTS), loc="upper center", columnspacing=1)
    for variant in dict.fromkeys(row["variant"] for row in memory):
        rows = [row for row in memory if row["variant"] == variant]
        right.plot([r["tokens"] for r in rows], [r["peak_mib"] for r in rows], marker="o", label=variant)
    right.set(xlabel="row length, tokens", ylabel="peak memory, MiB", ylim=(0, None))
    right.set_xticks(sorted({row["tokens"] for row in memory}))
    right.set_title(f"memory, documents of {manifest['config']['documents'][0]:,}")
    right.legend(fontsize=8)
    figure.suptitle(title(manifest), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
