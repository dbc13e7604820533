"""`anchorctx report`: folders in, one self-contained HTML file out. The same folders give the same file, byte for byte.

A new section is a function in a module under `sections/` that takes the material, and a line in SECTIONS.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from anchorctx.errors import UserError
from anchorctx.records.disk import Writing
from anchorctx.records.files import write_bytes
from anchorctx.records.wandb_run import WandbMode, check_wandb
from anchorctx.report.blocks import Build, Section
from anchorctx.report.collect import Material, TrainRun
from anchorctx.report.config import ReportConfig
from anchorctx.report.numbers import number, percent
from anchorctx.report.sections import comparison, evaluations, inputs, precision, reuse, ruler, training
from anchorctx.report.series import by_model
from anchorctx.report.wandb_report import send_report

Made = TypeVar("Made")
SECTIONS: Sequence[Build] = (
    evaluations.build_retrieval,
    evaluations.build_perplexity,
    ruler.build,
    ruler.build_other,
    evaluations.build_needle,
    comparison.build,
    precision.build,
    reuse.build,
    training.build,
    training.build_speed,
    inputs.build_data,
    inputs.build_pattern,
    inputs.build_provenance,
)
"""What a report may have, in the order of a reader's questions: how good, why, how it was made, from what."""


def write_report(config: ReportConfig, material: Material) -> Path:
    """Write the page to `config.out`, whole or not at all, and send it to W&B if asked; returns its path.

    Raises UserError where that is a folder, a section cannot be made from these rows, or W&B does not start.
    """
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file, such as {out / 'report.html'}")
    material.pretraining_length = config.pretraining_length
    title = config.title or ", ".join(dict.fromkeys(place.argument for place in material.places)) or "anchorctx"
    check_wandb(config.wandb, "wandb")
    # Rendered before anything is written: a section that refuses its rows leaves no new folder behind.
    page = render_page(title, material).encode()
    with Writing("the page", out.parent, len(page), "an earlier one is as it was" if out.exists() else ""):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, page)
    if config.wandb is not WandbMode.disabled:
        send_report(config, title, build_sections(material), material)
    return out


def build_sections(material: Material) -> list[Section]:
    """Those that the material has something for; UserError when one cannot be made from its rows."""
    return [section for build in SECTIONS if (section := _made(build, material)) is not None]


def render_page(title: str, material: Material) -> str:
    """The HTML of a report; UserError when a section cannot be made from these rows."""
    import jinja2

    # Names of models and folders are text, whatever they hold; an undefined name in the template is an error.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["numeric"] = lambda table, column: table.numeric(column)
    content: dict[str, Any] = {
        "title": title,
        "tiles": _made(tiles, material),
        "sections": build_sections(material),
        "style": Markup(_asset("page.css")),
        "script": Markup(_asset("page.js")),
    }
    return environment.from_string(_asset("page.html.j2")).render(content)


def _made(build: Callable[[Material], Made], material: Material) -> Made:
    """A part of the page; UserError where the files hold something else than their commands write."""
    try:
        return build(material)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"these files cannot be drawn ({type(error).__name__}: {error}): one of them was changed after its command "
            "wrote it; report fewer folders to find out which, and make it again"
        ) from error


def _asset(name: str) -> str:
    return (resources.files("anchorctx.report") / "assets" / name).read_text(encoding="utf-8")


# -- the few numbers at the top of the page ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """A number with what it is."""

    value: str
    name: str


def tiles(material: Material) -> list[Tile]:
    """What the folders have of: retrieval at the longest length, perplexity, precision, speed, saved attention."""
    found = [*_retrieval(material), *_perplexity(material), *_precision(material)]
    if material.runs:
        found += _training(material.runs[-1])
    return found


def _retrieval(material: Material) -> list[Tile]:
    series = by_model(material.rows, "retrieval_accuracy")
    if not series:
        return []
    model, rows = list(series.items())[-1]
    last = max(rows, key=lambda row: row.context["length"])
    length = last.context["length"]
    first = next(iter(series.values())).find("retrieval_accuracy", length=length)
    # The first model may not have been asked at the last one's longest length.
    before = f"{percent(first.value)} → " if len(series) > 1 and first is not None else ""
    return [Tile(f"{before}{percent(last.value)}", f"retrieval at {length:,} tokens ({model})")]


def _perplexity(material: Material) -> list[Tile]:
    series = by_model(material.rows, "perplexity")
    if not series:
        return []
    # A model has one such row, unless it was measured with several settings; then the last counts.
    values = [rows[-1].value for rows in series.values()]
    before = f"{values[0]:.3g} → " if len(values) > 1 else ""
    return [Tile(f"{before}{values[-1]:.3g}", f"held-out perplexity ({list(series)[-1]})")]


def _precision(material: Material) -> list[Tile]:
    # Only where the study advises something: else bfloat16's error is too small for the number to mean much.
    rows = [row.result for row in material.rows if row.result.metric == "precision_verdict"][:1]
    name = "of the bfloat16 RoPE error with float32 rotation"
    return [Tile(f"−{percent(r.value)}", f"{name} ({r.model})") for r in rows if r.context.get("recommendation")]


def _training(run: TrainRun) -> list[Tile]:
    speed, saved = run.column("perf/tokens_per_second")[1], run.column("perf/attention_flops_saved")[1]
    found = [Tile(number(statistics.median(speed)), f"tokens a second ({run.label})")] if speed else []
    return found + ([Tile(percent(statistics.fmean(saved)), "of full attention not computed")] if saved else [])
