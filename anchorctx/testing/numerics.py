"""Tolerances that are measured: a fast backend may err twice as much as plain eager code of its own dtype, no more.

Both errors are taken against the float64 reference, so the bound follows the case: long documents, large scores or
bfloat16 widen it, float32 on a tiny document narrows it. Only a floor of a few units in the last place is fixed, for
cases where eager code happens to be exact: a document of one token has no gradient for its query, which eager softmax
gets as an exact 0 and a flash kernel as the difference of two equal sums, `do.v - D`, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.reference import reference_attention
from anchorctx.attention.rope import rotary_modules
from anchorctx.layout import PackedLayout

Attention = Callable[..., torch.Tensor]
"""Of query, key and value, and of sinks where a test has them."""
NAMES = ("output", "dquery", "dkey", "dvalue", "dsinks")
EAGER_FACTOR = 2.0
"""How much worse than eager code of the same dtype a backend may be."""
FLOOR_ULPS = {torch.float64: 16.0, torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Units in the last place of the largest exact value, or of the largest term in its sum, that are always allowed.

Over 1,300 to 3,900 random layouts the cpu backend needed, beyond twice the eager error, at most 12.6 in float64, 5.4
in float32 (its vectorised exp is good to a few units), 0.3 in bfloat16 and 0.9 in float16 (both sum in float32).
"""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one tensor of a backend is from the exact one."""

    name: str
    error: float
    """Largest absolute difference from the float64 reference."""
    eager_error: float
    """The same for the dense reference computed in the backend's dtype."""
    floor: float

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        return EAGER_FACTOR * self.eager_error + self.floor

    @property
    def ok(self) -> bool:
        """Is the error within its bound? NaN is not."""
        return self.error <= self.bound


def output_and_gradients(attention: Attention, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(output, dquery, dkey, dvalue, ...) of `attention(query, key, value, ...)`; the output's gradient comes last."""
    *inputs, d_output = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attention(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, d_output.to(output.dtype))


def deviations(
    attention: Attention,
    tensors: Sequence[torch.Tensor],
    layouts: Sequence[PackedLayout],
    score: Score,
) -> list[Deviation]:
    """Output and gradients of `attention` against the reference, in float64 and in the tensors' own dtype.

    Args:
        attention: the backend under test, called as `attention(query, key, value)`, or with sinks behind them.
        tensors: query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), all of one dtype; sinks (Hq,), or none;
            the output's gradient (B, Hq, T, Dv).
        layouts, score: what `attention` is expected to compute.
    """

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        return reference_attention(q, k, v, layouts, score, sinks)

    q, k, v, *_, d_output = tensors
    exact = output_and_gradients(reference, *(x.double() for x in tensors))
    eager = output_and_gradients(reference, *tensors)
    actual = output_and_gradients(attention, *tensors)
    unit = FLOOR_ULPS[q.dtype] * torch.finfo(q.dtype).eps
    names = NAMES[: len(exact)]
    terms = _largest_terms(q, k, v, d_output, score)[: len(exact)]
    return [
        Deviation(name, max_error(a, x), max_error(e, x), unit * max(x.abs().max().item(), term))
        for name, a, e, x, term in zip(names, actual, eager, exact, terms, strict=True)
    ]


def assert_within_eager(found: Sequence[Deviation]) -> None:
    """Raise AssertionError that lists every tensor whose error is beyond its bound."""
    bad = [d for d in found if not d.ok]
    assert not bad, "; ".join(f"{d.name}: error {d.error:.3e}, eager {d.eager_error:.3e}" for d in bad)


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, taken in float64."""
    return (actual.double() - exact.double()).abs().max().item()


def observed_rope_dtype(model: torch.nn.Module) -> RopeDtype:
    """The precision in which `model` rotates, judged by the cosines that it makes and not by how they were asked for.

    A plain module answers in the dtype of its input; one set to float32, or to emulated bfloat16, always in its own.
    """
    module = rotary_modules(model)[0]
    more = [torch.zeros(1, 1, dtype=torch.int64), *getattr(module, "layer_types", [])[:1]]  # Gemma 3: one RoPE a kind
    answers = [module(torch.zeros(1, dtype=dtype), *more)[0].dtype for dtype in (torch.float32, torch.bfloat16)]
    if answers[0] == answers[1]:
        return RopeDtype.float32 if answers[0] is torch.float32 else RopeDtype.bfloat16_emulated
    return RopeDtype.bfloat16


def _largest_terms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, score: Score) -> list[float]:
    """For each of `NAMES`, the size of a term that may cancel: `scale * (do.v) * k` in dquery, and so on."""
    product = do.double().norm(dim=-1).max() * v.double().norm(dim=-1).max()
    scaled = score.scale * product
    return [0.0, (scaled * k.abs().max()).item(), (scaled * q.abs().max()).item(), 0.0, product.item()]
