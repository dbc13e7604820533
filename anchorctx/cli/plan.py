"""`anchorctx plan`: what a run will need and cost, before a machine is rented for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments
from anchorctx.config import resolve, schema
from anchorctx.plan.config import PlanConfig
from anchorctx.records.manifest import build_manifest, write_json

EXAMPLE = """\
anchorctx plan --recipe recipes/gpu/llama3_8b_128k.yaml gpu=H100 gpus=8
anchorctx plan model.path=meta-llama/Meta-Llama-3-8B model.dtype=bfloat16 row_length=524288 gpus=8 search=true"""


def run(arguments: Arguments) -> None:
    """Plan, print, and write what was asked for."""
    config = planned(arguments)
    if config is None:
        return
    from anchorctx.plan import table
    from anchorctx.plan.planner import Planner
    from anchorctx.plan.search import search
    from anchorctx.plan.simulate import simulate

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
        print(f"drawn: {scaling_figure(points, _title(planner.row_length, config), out / 'scaling.png')}")
    write_json(out / "plan.json", written)
    print(f"written: {out / 'plan.json'}")


def _title(row_length: int, config: PlanConfig) -> str:
    model = config.model.path or config.model.config.get("model_type", "model")
    return f"{model}, rows of {row_length:,} tokens, {config.gpu}"


def planned(arguments: Arguments) -> PlanConfig | None:
    """The plan's; a recipe is a training run's, whose settings are taken, with overrides of both kinds."""
    if arguments.recipe is None or arguments.help:
        return configuration("plan", dataclasses.replace(arguments, recipe=None), EXAMPLE)
    theirs = {field.name for field in dataclasses.fields(schema("train"))} - {"out_dir"}
    mine = [word for word in arguments.overrides if _key(word) not in theirs]
    run = resolve("train", [word for word in arguments.overrides if word not in mine], arguments.recipe)
    plan = resolve("plan", mine)
    taken = {name: getattr(run, name) for name in ("model", "pattern", "micro_rows", "tokens_per_step")}
    plan = dataclasses.replace(plan, **taken, parallel=run.parallel, memory=run.memory)
    if arguments.show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.structured(plan)), end="")
        return None
    return plan


def _key(word: str) -> str:
    """The first part of an override's key: `parallel` of `parallel.zero_stage=3`."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]
