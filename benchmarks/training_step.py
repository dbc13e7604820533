"""Time of whole training steps under AnchorAttention against full attention, on this machine's CPU.

    python benchmarks/training_step.py            some minutes on two cores; writes benchmarks/training_step_cpu.*
    python benchmarks/training_step.py --quick    seconds, to see that it works

A step is forward, backward and AdamW's update of one row of T tokens (and its copies of the anchor, one a document), in
float32, through the same model, loss and attention that `anchorctx train` uses. The model's width is chosen so that
attention has the share of the work that it has in LLaMA-2-7B at 65,536 tokens: under full attention that ratio is
T / (12 * width) against the layers' matrices, and 16,384 / (12 * 1,024) = 65,536 / (12 * 4,096). Its vocabulary is
small, as the head's share is in a 7B model.
Rounds go through all variants in turn; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from attention import equal_documents, lognormal_documents, processor, ratios
from tqdm import tqdm

from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models import ModelConfig, load_model
from anchorctx.models.loss import CausalLMLoss
from anchorctx.records.manifest import build_manifest, write_json

VOCABULARY = 1024


def main() -> None:
    """Measure, print the table, write JSON and picture."""
    arguments = parse_arguments()
    module = build(arguments)
    rows = layouts(arguments.tokens, arguments.document, arguments.seed)
    manifest = build_manifest("benchmarks/training_step", vars(arguments) | {"out": arguments.out.name}, **processor())
    seconds = measure(step_of(module, arguments.seed), rows, arguments.rounds)
    flops = ModelFlops.of(module.model)
    result = {
        name: {
            "seconds": seconds[name][1:],
            "full / this": ratios(seconds["full"], seconds[name]),
            "saved": 1 - 1 / ratios(seconds["full"], seconds[name])["median"],
            "flops_of_full": flops.step([row]) / flops.step([rows["full"]]),
            "documents": row.num_documents,
        }
        for name, row in rows.items()
    }
    print(table(manifest, result))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "training_step_cpu.json"
    write_json(path, {"manifest": manifest, "variants": result})
    draw(manifest, result, path.with_suffix(".png"))
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="row length")
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document where all are equal")
    parser.add_argument("--width", type=int, default=1024, help="hidden size; heads are of 64")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of all variants, after one to warm up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: to see that it works")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round must be timed")
    if arguments.quick:
        arguments.tokens, arguments.document, arguments.width, arguments.layers = 1024, 128, 128, 1
    return arguments


def build(arguments: argparse.Namespace) -> CausalLMLoss:
    """The model and its loss, as the training loop builds them."""
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": arguments.width}
    config |= {"intermediate_size": 8 * arguments.width // 3, "num_hidden_layers": arguments.layers}
    config |= {"num_attention_heads": arguments.width // 64, "num_key_value_heads": arguments.width // 64}
    config |= {"max_position_embeddings": arguments.tokens}
    return CausalLMLoss(load_model(ModelConfig(config=config, seed=arguments.seed)))


def layouts(tokens: int, document: int, seed: int) -> dict[str, PackedLayout]:
    """The timed rows by name; `full` first, which the others are compared with."""
    equal, spread = equal_documents(tokens, document), lognormal_documents(tokens, seed)
    return {
        "full": Pattern.full.apply(equal),
        f"anchor, documents of {document:,}": equal.with_copies()[0],
        "anchor, log-normal documents": spread.with_copies()[0],
        "intra_doc, log-normal documents": Pattern.intra_doc.apply(spread),
    }


def step_of(module: CausalLMLoss, seed: int) -> Callable[[PackedLayout], None]:
    """A function that trains one step on a row of random tokens with the given layout."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=True)
    generator = torch.Generator().manual_seed(seed)

    def step(layout: PackedLayout) -> None:
        ids = torch.randint(VOCABULARY, (1, layout.length), generator=generator)
        loss = module(ids, layout.position_ids()[None], (layout,), ids) / layout.length
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[PackedLayout], None], rows: dict[str, PackedLayout], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant and round, the warm-up first."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    with tqdm(total=(rounds + 1) * len(rows), unit="step") as bar:
        for _ in range(rounds + 1):
            for name, layout in rows.items():
                bar.set_description(name)
                began = time.perf_counter()
                step(layout)
                seconds[name].append(time.perf_counter() - began)
                bar.update()
    return seconds


def title(manifest: dict) -> str:
    """The machine and what ran on it, in one line."""
    config = manifest["config"]
    return (
        f"{manifest['cpu']}, {manifest['machine']['cpus']} cores, torch {manifest['versions']['torch']}; a row of "
        f"{config['tokens']:,} tokens, {config['layers']} layers of {config['width']:,}, {config['rounds']} rounds"
    )


def table(manifest: dict, result: dict) -> str:
    """The figures in Markdown: medians, and ratios with their range over the rounds."""
    lines = [title(manifest), "", "| row | documents | seconds a step | full / this | time saved | FLOPs of full's |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in result.items():
        ratio = row["full / this"]
        lines.append(
            f"| {name} | {row['documents']} | {statistics.median(row['seconds']):.2f} | {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}) | {row['saved']:.0%} | {row['flops_of_full']:.0%} |"
        )
    return "\n".join(lines)


def draw(manifest: dict, result: dict, path: Path) -> None:
    """Seconds a step, one bar a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    names = list(result)[::-1]
    medians = [statistics.median(result[name]["seconds"]) for name in names]
    bars = axes.barh(names, medians, color=["#D55E00" if name == "full" else "#0072B2" for name in names])
    axes.bar_label(bars, [f"{s:.1f} s, {result[n]['saved']:.0%} saved" for n, s in zip(names, medians, strict=True)])
    axes.set(xlabel="seconds a training step", xlim=(0, max(medians) * 1.3))
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(manifest), fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
