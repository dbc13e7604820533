"""What each command does with its configuration. Only what `--help` needs is imported at the top."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorctx.cli import doctor
from anchorctx.cli.help import configuration
from anchorctx.cli.main import Arguments
from anchorctx.config import check_whole, quoted, resolve, schema
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern

if TYPE_CHECKING:
    from anchorctx.cli.train import TrainCommand
    from anchorctx.data.config import PrepareConfig
    from anchorctx.data.packed_set import PackedSet
    from anchorctx.evals.config import EvalConfig, KvcommConfig
    from anchorctx.evals.evaluators.precision.config import PrecisionConfig
    from anchorctx.plan.config import PlanConfig
    from anchorctx.report.collect import Material
    from anchorctx.report.config import PlotConfig, ReportConfig
    from anchorctx.train.config import ExportConfig


def run(command: str, arguments: Arguments) -> int:
    """Run a command as it was typed, or print its help or configuration; returns the exit code."""
    if arguments.dry_run and command not in DRY_RUN:
        raise UserError(
            f"--dry-run is an option of anchorctx {', '.join(DRY_RUN)}, not of {command}: leave it out, or use --show"
        )
    if command == "doctor":
        return doctor.run(arguments)
    config = configured(command, arguments)
    if config is None:
        return 0
    return (DRY_RUN if arguments.dry_run else RUN)[command](config) or 0


def configured(command: str, arguments: Arguments) -> Any | None:
    """The command's configuration; None when `--help` or `--show` was answered instead."""
    if command == "plan" and arguments.recipe is not None and not arguments.help:
        return _plan_of_recipe(arguments)
    if command == "report":
        arguments = _with_folders(arguments)
    return configuration(command, arguments)


# -- before a run -----------------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig) -> None:
    """Make a packed set."""
    from anchorctx.data.prepare import prepare

    prepare(_with_folder(config))


def look(config: PrepareConfig) -> None:
    """Print what there is, and what each packing policy would make of it."""
    from anchorctx.data.inspection import inspect

    inspect(_with_folder(config))


def _with_folder(config: PrepareConfig) -> PrepareConfig:
    """The tokenizer of a GGUF file as a folder: `data` knows no models."""
    if not config.tokenizer.lower().endswith(".gguf"):
        return config
    from anchorctx.models.gguf import folder_of

    return dataclasses.replace(config, tokenizer=str(folder_of(config.tokenizer)))


def plan(config: PlanConfig) -> None:
    """Plan, print, and write plan.json and the picture where a folder was given."""
    from anchorctx.plan import table
    from anchorctx.plan.planner import Planner
    from anchorctx.plan.search import search, simulate
    from anchorctx.records.manifest import build_manifest, write_json

    planner = Planner(config)
    plan = search(planner) if config.search else planner.plan(config.parallel, config.memory)
    print(table.text(planner, plan))
    if config.out_dir is None:
        return
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, object] = {"manifest": build_manifest("plan", dataclasses.asdict(config))}
    written["plan"] = table.facts(planner, plan)
    if config.simulate:
        from anchorctx.report.figures.curves import scaling_figure

        written["scaling"] = points = simulate(planner, plan)
        model = config.model.path or config.model.config.get("model_type", "model")
        title = f"{model}, rows of {planner.row_length:,} tokens, {config.gpu}"
        print(f"drawn: {scaling_figure(points, title, out / 'scaling.png')}")
    write_json(out / "plan.json", written)
    print(f"written: {out / 'plan.json'}")


def _plan_of_recipe(arguments: Arguments) -> PlanConfig | None:
    """A training run's recipe, planned: the run's settings are taken from it, and overrides may be of both kinds."""
    of_train = {field.name for field in dataclasses.fields(schema("train"))} - {"out_dir"}
    # +parallel.zero_stage=3 is an override of the run's `parallel`
    first = {word: word.lstrip("+~").partition("=")[0].partition(".")[0] for word in arguments.overrides}
    run = resolve("train", [word for word in arguments.overrides if first[word] in of_train], arguments.recipe)
    plan = resolve("plan", [word for word in arguments.overrides if first[word] not in of_train])
    shared = ("model", "pattern", "micro_tokens", "anchor_visible", "tokens_per_step", "parallel", "memory")
    plan = dataclasses.replace(plan, **{name: getattr(run, name) for name in shared})
    if not arguments.show:
        return plan
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(plan)), end="")
    return None


# -- the run ----------------------------------------------------------------------------------------------------------


def train(config: TrainCommand) -> None:
    """Train in this process, which torchrun may have started beside others."""
    from anchorctx.train.inputs import check_inputs

    check_inputs(config)  # the loop imports DeepSpeed
    from anchorctx.evals.live import LiveEvals
    from anchorctx.train.loop import train

    train(config, [LiveEvals(config.live)] if config.live.every else [])


def export(config: ExportConfig) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from anchorctx.train.export import export

    print(f"exported to {export(config)}")


# -- measurements -----------------------------------------------------------------------------------------------------


def evaluate(config: EvalConfig) -> None:
    """Evaluate models, write results.jsonl and print it as a table."""
    from anchorctx.cli.eval import table
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.runner import evaluate

    rows = evaluate(config)
    if is_first():
        print("\n".join(table(rows)))
        print(f"\nwritten to {config.out_dir}/results.jsonl")


def precision(config: PrecisionConfig) -> None:
    """Study a model's rotation in bfloat16; prints a table and the verdict, and draws."""
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.evaluators.precision.verdict import table
    from anchorctx.evals.shortcuts import evaluate_precision
    from anchorctx.records.results import Rows
    from anchorctx.report.figures.precision import Study, precision_figure

    rows = evaluate_precision(config)
    if not is_first():
        return
    print(table(rows))
    figure = precision_figure(Study(rows[-1].context["model"], Rows(rows)), Path(config.out_dir) / "precision.png")
    print(f"\ndrawn: {figure}; for a page with all figures: anchorctx report {config.out_dir}")


def kvcomm(config: KvcommConfig) -> int:
    """Evaluate KV reuse, print the table and draw; 0, or 1 when the gate's arm is beyond its bounds."""
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.shortcuts import evaluate_reuse
    from anchorctx.records.disk import Writing
    from anchorctx.records.files import write_bytes
    from anchorctx.report.figures.frontier import draw_frontier
    from anchorctx.report.figures.prediction import draw_predictions
    from anchorctx.report.figures.reuse import draw_reuse
    from anchorctx.report.sections.reuse import reuse_table

    outcome = evaluate_reuse(config)
    verdict = outcome.verdict
    if is_first():
        table, out = reuse_table(outcome.rows), Path(config.out_dir)
        with Writing("the table", out, intact="all rows are in results.jsonl"):
            write_bytes(out / "kvcomm.md", f"{table}\n".encode())
        for draw in (draw_reuse, draw_predictions, draw_frontier):
            for path in draw(outcome.rows, out):
                print(f"drawn: {path}")
        print(f"\n{table}")  # last, since it ends with what to use
        if verdict is not None:
            print(verdict.text)
    return 0 if verdict is None or verdict.passed else 1


def forecast(config: EvalConfig | PrecisionConfig | KvcommConfig) -> None:
    """Print what an evaluation would do and how long that would take, measured on a first piece of it."""
    from anchorctx.evals import runner, shortcuts
    from anchorctx.evals.config import EvalConfig, KvcommConfig
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.forecast import duration

    if isinstance(config, KvcommConfig):
        config = shortcuts.reuse_evaluation(config)
    found = runner.forecast(config if isinstance(config, EvalConfig) else shortcuts.precision_evaluation(config))
    if is_first():
        total = duration(sum(part.seconds for part in found)) if found else "nothing to do: all of it is there already"
        print("\n".join([*map(str, found), f"in all: {total}"]))


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot(config: PlotConfig) -> None:
    """Draw what the inputs allow, and print the paths."""
    from anchorctx.data.packed_set import PackedSet
    from anchorctx.report.plot import plot

    layout = None
    if config.packed is not None:
        packed = PackedSet.open(config.packed, verify=False)
        row = _typical_row(packed.row_documents.tolist()) if config.row is None else config.row
        layout = _layout_of(packed, row)
    for path in plot(config, layout):
        print(f"drawn: {path}")


def _typical_row(documents: list[int]) -> int:
    """The first row whose number of documents is nearest to the mean."""
    mean = statistics.fmean(documents)
    return min(range(len(documents)), key=lambda row: abs(documents[row] - mean))


def _layout_of(packed: PackedSet, row: int) -> PackedLayout:
    if not 0 <= row < len(packed):
        raise UserError(f"row={row} is not in the packed set, which has {len(packed)} rows: give 0 or more")
    return packed.row(row).layout


def report(config: ReportConfig) -> None:
    """Write one HTML page about runs and evaluations, and print where it is."""
    from anchorctx.report.collect import collect
    from anchorctx.report.page import write_report

    material = collect(config.runs)
    material.layouts = _layouts(config, material)
    out = write_report(config, material)
    print(f"report: {out} ({out.stat().st_size / 1000:,.0f} kB); open it in a browser, no network needed")


def _with_folders(arguments: Arguments) -> Arguments:
    """`report A B` as `report runs=[A,B]`: words without `=` are folders, and so is an existing folder `lr=1e-5`."""
    check_whole(arguments.overrides)
    folders = [word for word in arguments.overrides if "=" not in word or Path(word).is_dir()]
    if not folders:
        return arguments
    rest = [word for word in arguments.overrides if word not in folders]
    if any(word.startswith("runs=") for word in rest):
        raise UserError(f"folders are given twice, as {folders[0]} and as runs=[...]: use one of the two")
    return dataclasses.replace(arguments, overrides=[f"runs=[{','.join(map(quoted, folders))}]", *rest])


def _layouts(config: ReportConfig, material: Material) -> dict[Path, PackedLayout]:
    """A row of the first packed set, under the pattern asked for, or that of the first run, or AnchorAttention's."""
    from anchorctx.data.packed_set import PackedSet

    used = [run.place.pattern for run in material.runs]
    name = config.pattern or next((pattern for pattern in used if pattern), Pattern.anchor.value)
    if name not in list(Pattern):
        raise UserError(f"pattern={name} is unknown: choose {', '.join(Pattern)}")
    # a page draws one set: the first
    for place in material.packed[:1]:
        packed = PackedSet.open(place.path, verify=False)
        return {place.path: Pattern(name).apply(_layout_of(packed, config.row))}
    return {}


RUN: dict[str, Callable[[Any], int | None]] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "export": export,
    "eval": evaluate,
    "precision": precision,
    "kvcomm": kvcomm,
    "plot": plot,
    "report": report,
}
DRY_RUN: dict[str, Callable[[Any], int | None]] = {
    "prepare": look,
    "eval": forecast,
    "precision": forecast,
    "kvcomm": forecast,
}
"""What `--dry-run` does instead."""
