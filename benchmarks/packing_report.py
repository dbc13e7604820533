"""Tables and picture of `packing.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRL_OF = {"ours, best_fit": "trl, bfd_split", "ours, concat_split": "trl, wrapped"}
"""What does the same."""
LOOPS = ("token loop", "piece loop", "list loop")


def report(measured: dict[str, Any]) -> str:
    """All tables in Markdown."""
    manifest = measured["manifest"]
    versions = ", ".join(f"{name} {manifest['versions'].get(name, '?')}" for name in ("numpy", "tokenizers", "python"))
    parts = [
        f"# Packing\n\n`benchmarks/packing.py` on {manifest['machine']['cpus']} cores; {versions}.",
        _speed(measured["speed"]),
        _memory(measured["memory"]),
        _policies(measured["policies"]),
        _balance(measured["balance"]),
        _tokenise(measured["tokenise"]),
        "![Packing](packing.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _speed(found: list[dict[str, Any]]) -> str:
    rate = {(row["row_length"], row["way"]): row["tokens_per_second"] for row in found}
    rows = []
    for row in found:
        length, way = row["row_length"], row["way"]
        trl = rate.get((length, TRL_OF.get(way, "")))
        loops = [rate[length, name] for name in LOOPS]
        own = row["tokens_per_second"]
        versus = [f"{own / trl:.1f}x" if trl else "", *(f"{own / loop:.1f}x" for loop in loops)]
        cells = [f"{length:,}", way, f"{own / 1e6:,.1f} M", *(versus if way in TRL_OF else [""] * 4)]
        rows.append([*cells, f"{row['rows']:,}"])
    head = ["T", "way", "tokens/s", "over trl's", *(f"over the {loop}" for loop in LOOPS), "rows"]
    millions = found[0]["tokens"] / 1e6
    intro = (
        f"## Speed\n\n{millions:.0f} M tokens in documents of log-normal lengths, in memory, one thread. Ours makes "
        "ids, loss weights, boundaries and the account; the token loop and the piece loop make ids, labels and "
        "document numbers; trl and the list loop make ids."
    )
    return f"{intro}\n\n{_table(head, rows)}"


def _memory(found: list[dict[str, Any]]) -> str:
    rows = [
        [f"{row['corpus_gib']:g} GiB", f"{row['tokens'] / 1e6:,.0f} M", f"{row['peak_gib']:.2f} GiB"]
        + [f"{row['imports_gib']:.2f} GiB", f"{row['seconds']:.0f} s"]
        for row in found
    ]
    head = ["corpus", "tokens", "peak memory", "of which imports", "plan, pack, write, checksums"]
    return f"## Memory\n\nResident memory, pages of mapped files included.\n\n{_table(head, rows)}"


def _policies(found: list[dict[str, Any]]) -> str:
    rows = [
        [f"{row['row_length']:,}", row["policy"], row["long_documents"], f"{row['rows']:,}", f"{row['padding']:.2%}"]
        + [f"{row['dropped']:.2%}", f"{row['cut_documents']:,} of {row['documents']:,}"]
        + [f"{row['attention_of_full']:.1%}"]
        for row in found
    ]
    head = ["T", "policy", "long documents", "rows", "padding", "tokens dropped", "documents cut", "attention of full"]
    return f"## Policies\n\nThe Python standard library's sources.\n\n{_table(head, rows)}"


def _balance(found: list[dict[str, Any]]) -> str:
    rows = [
        [f"{row['row_length']:,}", str(row["rows_per_step"]), f"{row['shuffled']:.2f}", f"{row['balanced']:.3f}"]
        for row in sorted(found, key=lambda row: (row["row_length"], row["rows_per_step"]))
    ]
    head = ["T", "rows a step", "shuffled rows", "balanced rows"]
    intro = "## Balance\n\nAttention cost of the slowest of 8 processes over the mean; log-normal documents, best fit."
    return f"{intro}\n\n{_table(head, rows)}"


def _tokenise(found: dict[str, Any]) -> str:
    alone, ours = (found["tokens_per_second"][name] for name in ("alone", "ours"))
    millions, megabytes = found["tokens"] / 1e6, found["megabytes"]
    return (
        f"## Tokenising\n\nA .jsonl file of {megabytes:.0f} MB (the standard library), {millions:.1f} M tokens, "
        f"{found['cores']} cores: `tokenizers` alone, texts in memory, {alone / 1e6:.2f} M tokens/s; the first stage "
        "of `prepare` (processes started, file read and parsed, tokenised, hashed, written) "
        f"{ours / 1e6:.2f} M tokens/s: {found['ratio']:.0%} "
        f"({found['ratios'][0]:.0%} to {found['ratios'][-1]:.0%} by round)."
    )


def draw(measured: dict[str, Any], path: Path) -> None:
    """Speed, memory, waste of each policy and balance as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (speed, memory), (waste, balance) = axes
    found = [row for row in measured["speed"] if row["row_length"] == 4096]
    bars = speed.barh([row["way"] for row in found][::-1], [row["tokens_per_second"] / 1e6 for row in found][::-1])
    speed.bar_label(bars, fmt=" %.0f", fontsize=8)
    speed.set(xscale="log", xlim=(4, 3000), xlabel="million tokens a second", title="Speed, rows of 4,096")
    sizes = measured["memory"]
    memory.plot([row["corpus_gib"] for row in sizes], [row["peak_gib"] for row in sizes], marker="o")
    memory.set(xlabel="corpus, GiB", ylabel="peak memory, GiB", ylim=(0, 1.05), title="Memory")
    memory.axhline(1, color="#888888", linestyle=":")
    _draw_waste(waste, [row for row in measured["policies"] if row["row_length"] == 4096])
    rows = [row for row in measured["balance"] if row["row_length"] == 65_536]
    for name in ("shuffled", "balanced"):
        balance.plot([str(row["rows_per_step"]) for row in rows], [row[name] for row in rows], marker="o", label=name)
    balance.axhline(1.05, color="#888888", linestyle=":")
    balance.set(ylim=(0.9, None), xlabel="rows a step, 8 processes", ylabel="slowest process over the mean")
    balance.set_title("Attention cost, rows of 65,536")
    balance.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_waste(axes: Any, found: list[dict[str, Any]]) -> None:
    names = [f"{row['policy']}, {row['long_documents']}" for row in found][::-1]
    padding = [100 * row["padding"] for row in found][::-1]
    dropped = [100 * row["dropped"] for row in found][::-1]
    places = range(len(names))
    for offset, values, label in ((0.2, padding, "padding, of the rows"), (-0.2, dropped, "dropped, of the corpus")):
        bars = axes.barh([place + offset for place in places], values, 0.38, label=label)
        axes.bar_label(bars, fmt=" %.1f", fontsize=7)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set(xlabel="% of tokens", xlim=(0, 110), title="Standard library, rows of 4,096")
    axes.legend(frameon=False, fontsize=8)
