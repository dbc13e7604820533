"""A plan as text and as JSON: the table of bytes, whether it fits, what a step costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anchorctx.flops import GIB
from anchorctx.plan.planner import Plan, Planner
from anchorctx.records.table import text_table

PART_NOTES = {
    "parameters": "weights that stay on the GPU",
    "gradients": "held between micro-batches, or being reduced",
    "optimizer": "float32 copy and Adam's moments",
    "gathered": "ZeRO 3's gathered weights, and communication buckets",
    "activations": "kept for the backward pass",
    "logits": "a tile's logits and the head's gradient",
    "working": "the layer at work",
    "runtime": "CUDA, NCCL (assumed)",
}


def text(planner: Planner, plan: Plan) -> str:
    """The whole plan, as `anchorctx plan` prints it."""
    return "\n".join([*_head(planner, plan), "", *_bytes(planner, plan), "", *_step(planner, plan)])


def facts(planner: Planner, plan: Plan) -> dict[str, Any]:
    """The same for `plan.json`: sizes in bytes, operations, seconds."""
    cost = plan.cost
    return {
        "settings": overrides(plan),
        "row_length": planner.row_length,
        "weights": planner.weights.count,
        "fits": plan.fits,
        "usable": plan.usable,
        "total": plan.parts.total,
        "parts": asdict(plan.parts),
        "cost": asdict(cost)
        | {
            "seconds": cost.seconds,
            "tokens_per_second": cost.tokens / cost.seconds,
            "mfu": cost.utilisation(plan.job.gpus, planner.config.machine.peak),
        },
    }


def overrides(plan: Plan) -> list[str]:
    """Overrides that make `anchorctx train` run this plan."""
    parallel, memory = plan.parallel, plan.memory
    wanted = {
        "parallel.zero_stage": parallel.zero_stage,
        "parallel.sequence_parallel": parallel.sequence_parallel,
        "parallel.offload_optimizer": parallel.offload_optimizer,
        "parallel.offload_parameters": parallel.offload_parameters,
        "memory.checkpoint_every": plan.job.every,
        "memory.mlp_tile": memory.mlp_tile,
        "memory.offload_activations": memory.offload_activations.value,
    }
    return [f"{key}={str(value).lower()}" for key, value in wanted.items()]


def _head(planner: Planner, plan: Plan) -> list[str]:
    config, parallel, job = planner.config, plan.parallel, plan.job
    model = config.model.path or planner.hf_config.model_type
    lines = [
        f"{model}: {planner.weights.count / 1e9:.2f} billion weights, {config.model.dtype.value}; "
        f"rows of {planner.row_length:,} tokens, pattern {config.pattern.value}",
        f"{config.gpus} x {config.gpu}: {config.gpus // parallel.sequence_parallel} data-parallel x "
        f"{parallel.sequence_parallel} sequence-parallel, ZeRO {parallel.zero_stage}; "
        f"{job.rows} rows ({plan.cost.tokens:,} tokens) a step in {job.accumulation} micro-batch"
        + ("es" if job.accumulation > 1 else ""),
    ]
    return [*lines, "settings: " + " ".join(overrides(plan))]


def _bytes(planner: Planner, plan: Plan) -> list[str]:
    parts = plan.parts
    moment = parts.moment if parts.moment in ("loss", "update") else f"{parts.moment} pass"
    lines = [(name, getattr(parts, name), note) for name, note in PART_NOTES.items()]  # bytes
    room = plan.usable - parts.total
    verdict = f"fits, {room / GIB:.1f} GiB to spare" if plan.fits else f"DOES NOT FIT, {-room / GIB:.1f} GiB too much"
    lines.append(("total", parts.total, f"of {plan.usable / GIB:.1f} usable: {verdict}"))
    if parts.host:
        lines.append(("host", parts.host, "in CPU memory (or files), for each GPU"))
    lines.append(("keys, values", _kv(planner, plan), "of one layer, within the above"))
    rows = ((name, f"{size / GIB:.2f} GiB", note) for name, size, note in lines)
    return text_table([f"memory of a GPU when it holds most, in the {moment}", *rows], "<><", indent=2)


def _kv(planner: Planner, plan: Plan) -> float:
    """Bytes of one layer's keys and values in one process."""
    # between the exchanges a process has all tokens of H / N heads; where there are fewer heads than processes, of one
    shape, sequence = planner.shape, plan.parallel.sequence_parallel
    heads = max(shape.kv_heads, sequence) / sequence
    return 2 * planner.config.micro_rows * planner.row_length * heads * shape.head_dim * shape.element


def _step(planner: Planner, plan: Plan) -> list[str]:
    cost, assume = plan.cost, planner.config.assume
    mfu = cost.utilisation(plan.job.gpus, planner.config.machine.peak)
    rows = {
        "operations": f"{cost.linear / 1e15:,.1f} PFLOP in matrices, {cost.attention / 1e15:,.1f} in attention",
        "attention": f"{cost.saved:.1%} of full attention's operations are left out for this corpus",
        "sent": f"{cost.sequence_bytes / 1e9:,.1f} GB for sequence parallelism, {cost.zero_bytes / 1e9:,.1f} GB for "
        "ZeRO, by each GPU",
        "time": f"{cost.seconds:,.1f} s: {cost.compute_seconds:,.1f} computing, {cost.exchange_seconds:,.1f} in "
        f"exchanges, {cost.zero_seconds:,.1f} waiting for ZeRO",
        "rate": f"{cost.tokens / cost.seconds:,.0f} tokens/s, MFU {mfu:.0%}",
        "assumed": f"{assume.linear:.0%} of the peak in matrices, {assume.attention:.0%} in attention, "
        f"{assume.link:.0%} of links, {assume.overlap:.0%} of ZeRO hidden (assume.*)",
    }
    return text_table(["a step", *rows.items()], indent=2)
