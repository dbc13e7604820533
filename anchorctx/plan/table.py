"""A plan as text and as JSON: the table of bytes, whether it fits, what a step costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anchorctx.flops import GIB
from anchorctx.plan.planner import Plan, Planner, shorter
from anchorctx.records.table import text_table

PART_NOTES = {
    "parameters": "weights that stay on the GPU",
    "gradients": "held between pieces, or being reduced",
    "optimizer": "float32 copy and Adam's moments",
    "gathered": "ZeRO 3's gathered weights, and communication buckets",
    "activations": "kept for the backward pass",
    "logits": "a tile's logits and the head's gradient",
    "working": "the layer at work",
    "runtime": "CUDA, NCCL (assumed)",
}


def text(planner: Planner, plan: Plan) -> str:
    """The whole plan, as `anchorctx plan` prints it."""
    parts = [_head(planner, plan), _pieces(planner, plan), _bytes(planner, plan), _step(planner, plan)]
    if not plan.fits:
        parts.append([_remedy(plan)])
    return "\n\n".join("\n".join(part) for part in parts)


def facts(planner: Planner, plan: Plan) -> dict[str, Any]:
    """The same for `plan.json`: sizes in bytes, operations, seconds."""
    cost = plan.cost
    return {
        "settings": overrides(plan),
        "row_length": planner.row_length,
        "micro_tokens": plan.job.micro_tokens,
        "held": asdict(plan.held),
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
        "micro_tokens": plan.job.micro_tokens,
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
        f"{config.gpus} x {config.gpu}, ZeRO {parallel.zero_stage}; {job.rows} rows "
        f"({plan.cost.tokens:,} tokens) a step",
    ]
    return [*lines, "settings: " + " ".join(overrides(plan))]


def _pieces(planner: Planner, plan: Plan) -> list[str]:
    """What one pass of a GPU holds, and what becomes of documents that are longer."""
    cost, job, longest = plan.cost, plan.job, planner.documents.longest
    each = cost.computed / cost.pieces / job.gpus
    shared = job.parallel.sequence_parallel
    way = f"each shared by {shared} GPUs" if shared > 1 else "each a piece of one GPU"
    rows = {
        "pieces": f"{cost.pieces:,.1f} a step on each GPU, {each:,.0f} tokens on average, {job.micro_tokens:,} at most",
        "computed": f"{cost.computed:,.0f} tokens, copies included: {cost.computed / cost.tokens - 1:+.2%}",
        "longest": f"document: {longest:,} tokens with its copy",
        "long": f"{cost.long_documents:,.1f} documents a step are longer than a piece, {way}: "
        f"{cost.sequence_bytes / 1e9:,.1f} GB exchanged by each GPU",
    }
    whole = planner.whole_row(job)
    if whole is not None:
        need = planner.parts(job, plan.memory, whole).total
        verdict = "fits" if need <= plan.usable else "does not fit"
        rows["a row"] = f"of one document would need {need / GIB:.1f} GiB of each GPU: {verdict}"
    return text_table(["documents", *rows.items()], indent=2)


def _remedy(plan: Plan) -> str:
    """One sentence for a plan that does not fit."""
    ways = ["parallel.sequence_parallel"] if plan.held.document else []
    ways += ["memory=long (recomputation, tiles)", "search=true"]
    return f"{plan.held} does not fit: try {', '.join(ways)}{f', or {less}' if (less := shorter(plan)) else ''}"


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
    return text_table([f"memory of a GPU when it holds most, in the {moment} of {plan.held}", *rows], "<><", indent=2)


def _kv(planner: Planner, plan: Plan) -> float:
    """Bytes of one layer's keys and values in one process."""
    # between the exchanges a process has all tokens of H / N heads; where there are fewer heads than processes, of one
    shape, sequence = planner.shape, plan.held.processes
    heads = max(shape.kv_heads, sequence) / sequence
    return plan.held.tokens * heads * (shape.head_dim + shape.value_dim) * shape.element


def _step(planner: Planner, plan: Plan) -> list[str]:
    cost, assume = plan.cost, planner.config.assume
    mfu = cost.utilisation(plan.job.gpus, planner.config.machine.peak)
    rows = {
        "operations": f"{cost.linear / 1e15:,.1f} PFLOP in matrices, {cost.attention / 1e15:,.1f} in attention",
        "attention": f"{cost.saved:.1%} of full attention's operations are left out for this corpus",
        "sent": f"{cost.sequence_bytes / 1e9:,.1f} GB for long documents, {cost.zero_bytes / 1e9:,.1f} GB for ZeRO, by "
        "each GPU",
        "time": f"{cost.seconds:,.1f} s: {cost.compute_seconds:,.1f} computing, {cost.waiting_seconds:,.1f} waiting "
        f"for other GPUs, {cost.exchange_seconds:,.1f} in exchanges, {cost.zero_seconds:,.1f} waiting for ZeRO",
        "rate": f"{cost.tokens / cost.seconds:,.0f} tokens/s, MFU {mfu:.0%}",
        "assumed": f"{assume.linear:.0%} of the peak in matrices, {assume.attention:.0%} in attention of long "
        f"documents (at most {assume.attention_tflops:,.0f} TFLOP/s), "
        f"{assume.link:.0%} of links, {assume.overlap:.0%} of ZeRO hidden (assume.*)",
    }
    return text_table(["a step", *rows.items()], indent=2)
