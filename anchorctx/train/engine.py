"""The DeepSpeed engine, from a configuration that is generated in full: nothing is left to "auto"."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch

from anchorctx.flops import whole_shape
from anchorctx.parallel.config import BUCKET, LIVE, SUBGROUP, ParallelConfig
from anchorctx.parallel.dist import Ranks
from anchorctx.parallel.extension import load_cpu_adam
from anchorctx.train.config import OptimConfig


def deepspeed_config(
    parallel: ParallelConfig,
    optim: OptimConfig,
    *,
    dtype: torch.dtype,
    world: int,
    cuda: bool,
) -> dict[str, Any]:
    """The whole DeepSpeed configuration as a dictionary.

    Steps have different numbers of micro-batches, so that the loop itself says which is the last
    (`set_gradient_accumulation_boundary`); DeepSpeed's own count is one, and it scales nothing.
    """
    adam = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    # torch's own AdamW needs no compiler; offloading needs DeepSpeed's CPU Adam. On CUDA fused: foreach holds a float32
    # temporary of all weights (1.24 billion on an H200: 4.6 GiB, and 27.2 ms against 10.1).
    if not parallel.offload_optimizer:
        adam |= {"torch_adam": True, "fused" if cuda else "foreach": True}
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip,
        "bf16": {"enabled": dtype is torch.bfloat16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": _accumulation_dtype(dtype, parallel.zero_stage)},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": _zero(parallel, pin=cuda),
        "steps_per_print": 10**9,  # our own callbacks report
        "wall_clock_breakdown": False,
    }


def build_engine(
    module: torch.nn.Module,
    parallel: ParallelConfig,
    optim: OptimConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
) -> Any:
    """`deepspeed.initialize` on `module`, whose forward returns the loss; returns the engine."""
    import deepspeed

    if parallel.offload_optimizer:
        load_cpu_adam()  # before processes wait for each other
    config = deepspeed_config(parallel, optim, dtype=dtype, world=ranks.world, cuda=ranks.device.type == "cuda")
    groups = parameter_groups(module.named_parameters(), optim.weight_decay)
    logging.getLogger("DeepSpeed").addFilter(_is_not_of_skipping)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)  # type: ignore[arg-type]
    return engine


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with decay, vectors without. Empty groups are left out."""
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    # under ZeRO 3 a parameter in its share is flat: ask for the shape of the whole
    matrices = [parameter for parameter in trainable if len(whole_shape(parameter)) > 1]
    vectors = [parameter for parameter in trainable if len(whole_shape(parameter)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(engine: Any, lr: float) -> None:
    """Set the learning rate of the next update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _is_not_of_skipping(record: logging.LogRecord) -> bool:
    """DeepSpeed calls every update that is not made an overflow, also what `discard` asks for: `health` says it."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def update(engine: Any) -> float | None:
    """Make the update from the gradients summed so far; returns their global norm before clipping.

    None where they are not finite: the norm is the same on all processes, and none of them changes weights or states.
    """
    engine.step()
    norm = float(engine.get_global_grad_norm())
    assert engine.was_step_applied() == math.isfinite(norm), "DeepSpeed decides by the norm"
    return norm if math.isfinite(norm) else None


def discard(engine: Any) -> None:
    """Drop the gradients summed so far: weights, the optimizer's states and its count of updates stay as they are."""
    # an infinite norm makes DeepSpeed let go of all that it has summed, which lies in other places at each stage
    infinite = torch.tensor(math.inf)
    sharded = engine.zero_optimization_stage() == 3
    name = "_get_norm_groups" if sharded else "scaled_global_norm"
    setattr(engine.optimizer, name, lambda *_, **__: [infinite] if sharded else infinite)
    try:
        engine.step()
    finally:
        delattr(engine.optimizer, name)  # the class's own again
    assert not engine.was_step_applied(), "DeepSpeed decides by the norm"


def _accumulation_dtype(dtype: torch.dtype, stage: int) -> str:
    """Micro-batches are summed in float32; DeepSpeed's own choice is the weights' dtype.

    Not at ZeRO 1 with bfloat16 weights: there float32 means another optimizer (BF16_Optimizer), which holds all
    gradients twice and writes checkpoints of another form.
    """
    return "bf16" if stage == 1 and dtype is torch.bfloat16 else "fp32"


def _zero(parallel: ParallelConfig, pin: bool) -> dict[str, Any]:
    cpu = {"device": "cpu", "pin_memory": pin}
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": pin,  # separate streams: on CUDA only
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if parallel.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "sub_group_size": SUBGROUP}
        zero |= {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = cpu
    if parallel.offload_parameters:
        zero["offload_param"] = cpu
    return zero
