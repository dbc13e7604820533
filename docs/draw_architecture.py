"""The packages of anchorctx and who imports whom, read from the sources, as a picture for docs/architecture.md.

.venv/bin/python docs/draw_architecture.py [FILE]        default: docs/images/architecture.png
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anchorctx"
FOUNDATION = ("records", "layout", "pieces", "errors", "settings", "flops", "interrupt")
"""Every package may import these: they are drawn as the ground, without arrows."""
LEFT_OUT = ("testing", "lazy", "__main__", "__init__")
WHAT = {
    "cli": "commands, their help, exit codes",
    "config": "YAML and key=value, checked",
    "train": "engine, loop, checkpoints, export",
    "evals": "one runner, the evaluators",
    "plan": "memory and time before a run",
    "data": "documents, packed rows, batches",
    "report": "figures, and one HTML page",
    "parallel": "processes, what they share",
    "models": "loading, loss, memory switches",
    "kvcomm": "KV caches that agents share",
    "integrations": "attach, a collator, a dataset",
    "attention": "kernels, the merge, RoPE",
    "records": "files, manifests, results",
    "layout": "what documents see",
    "pieces": "which documents go together",
    "errors": "what a user can mend",
    "settings": "ranges of numbers",
    "flops": "what a model costs",
    "interrupt": "being told to end",
}
"""A package that is not in here is drawn with its name alone."""
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#8C6BB1", "#E69F00", "#56B4E9", "#CC79A7", "#222222")

Arrows = Mapping[str, set[str]]


def imported(tree: ast.AST, inside: list[str]) -> Iterator[str]:
    """Top-level names under anchorctx that a module imports; `inside` is the dotted package that holds it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "anchorctx" and len(name) > 1)


def arrows() -> dict[str, set[str]]:
    """Each package (or module at the top) with those that it imports, the foundation and itself left out."""
    tops = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    found: dict[str, set[str]] = {top: set() for top in sorted(tops - set(LEFT_OUT) - set(FOUNDATION))}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = ["anchorctx", *path.relative_to(PACKAGE).parts[:-1]]
        top = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if top in found:
            found[top] |= set(imported(ast.parse(path.read_text()), inside)) & set(found) - {top}
    return found


def reduced(graph: Arrows) -> dict[str, set[str]]:
    """Without the arrows that follow from others: a -> c where there is a -> b -> c."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(other) for other in graph[name]))

    return {name: {b for b in to if not any(b in below(c) for c in to - {b})} for name, to in graph.items()}


def heights(graph: Arrows) -> dict[str, int]:
    """The row of each package, 0 at the bottom: as high as it can be and still be below all that import it.

    One that nobody imports stands right above what it imports.
    """

    def depth(name: str) -> int:
        return max((1 + depth(other) for other, to in graph.items() if name in to), default=0)

    depths = {name: depth(name) for name in graph}
    rows = {name: max(depths.values()) - below for name, below in depths.items()}
    return rows | {name: 1 + max(rows[other] for other in to) for name, to in graph.items() if to and not depths[name]}


def places(graph: Arrows) -> dict[str, tuple[float, float]]:
    """The middle of each box: rows by height, and in a row by where those are that it imports or that import it.

    Below the top row, one that nobody imports stands at the right end of its row, where no arrow passes.
    """
    row_of = heights(graph)
    used = set().union(*graph.values())
    aside = [name for name in graph if name not in used and graph[name] and row_of[name] < max(row_of.values())]
    if aside:
        where = places({name: to for name, to in graph.items() if name not in aside})
        for name in aside:
            right = max(x for x, y in where.values() if y == row_of[name])
            where[name] = (right + 1, float(row_of[name]))
        return where
    rows = [sorted(name for name in graph if row_of[name] == row) for row in range(max(row_of.values()) + 1)]
    where = {name: (i - (len(row) - 1) / 2, float(row_of[name])) for row in rows for i, name in enumerate(row)}
    for _ in range(6):
        for row in [*rows, *reversed(rows)]:
            ends = {name: [*graph[name], *(other for other in graph if name in graph[other])] for name in row}
            pull = {name: sum(where[end][0] for end in ends[name]) / max(1, len(ends[name])) for name in row}
            above = [other for other in graph if row[0] in graph[other] and row_of[other] == row_of[row[0]] + 1]
            middle = where[above[0]][0] if len(row) == 1 and above else 0.0
            for i, name in enumerate(sorted(row, key=lambda name: pull[name])):
                where[name] = (middle + i - (len(row) - 1) / 2, where[name][1])
    return where


def draw(path: Path) -> None:
    """The picture: packages as boxes, an arrow from each to those that it imports and that no other brings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    graph = reduced(arrows())
    where = places(graph)
    width, height = 0.94, 0.42
    left, right = min(x for x, _ in where.values()) - 0.5, max(x for x, _ in where.values()) + 0.5
    figure, axes = pyplot.subplots(figsize=(2.7 * (right - left), 1.25 * (2 + max(y for _, y in where.values()))))

    def box(name: str, x: float, y: float, wide: float, colour: str) -> None:
        shape = pyplot.Rectangle((x - wide / 2, y - height / 2), wide, height, fc="white", ec=colour, lw=1.6, zorder=2)
        axes.add_patch(shape)
        axes.text(x, y + 0.08, name, ha="center", va="center", weight="bold", color=colour, fontsize=12, zorder=3)
        axes.text(x, y - 0.1, WHAT.get(name, ""), ha="center", va="center", fontsize=7.5, color="#333333", zorder=3)

    def end_of(name: str, ends: Iterable[str], other: str) -> float:
        """Where along the edge of a box the arrow to or from `other` is, in the order of all that are there."""
        order = sorted(ends, key=lambda end: where[end][0])
        return where[name][0] + (order.index(other) - (len(order) - 1) / 2) * 0.6 * width / max(2, len(order))

    for number, (name, (x, y)) in enumerate(sorted(where.items(), key=lambda item: (-item[1][1], item[1][0]))):
        colour = COLOURS[number % len(COLOURS)]
        box(name, x, y, width, colour)
        for other in sorted(graph[name]):
            start = (end_of(name, graph[name], other), y - height / 2)
            importers = [importer for importer in graph if other in graph[importer]]
            end = (end_of(other, importers, name), where[other][1] + height / 2 + 0.01)
            style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", end, start, arrowprops=style, zorder=1)
    step = (right - left) / len(FOUNDATION)
    for i, name in enumerate(FOUNDATION):
        box(name, left + (i + 0.5) * step, -0.95, step - 0.06, "#555555")
    axes.text(left + 0.03, -0.64, "every package may import these:", fontsize=8, color="#333333", va="bottom")
    axes.set(xlim=(left, right), ylim=(-1.22, max(y for _, y in where.values()) + 0.3))
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "architecture.png")
