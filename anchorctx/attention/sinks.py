"""Attention sinks: a logit a head that is learned, takes its share of every softmax, and has no value (gpt-oss).

A kernel attends without it and hands out the log-sum-exp. The sink is one more column of scores, merged in by the rule
for partial softmaxes (`attention.merge`), with a value of zero:

    lse' = logaddexp(lse, sink)        o' = o * exp(lse - lse')

Backward, the kernel's own backward is given (o', lse'), which are the total softmax's, and so yields dq, dk and dv
exactly. The sink's own gradient is that of any score, summed over the tokens, where the value is zero:

    dsink = -sum exp(sink - lse') * D        D = rowsum(do * o')

Nothing is recomputed and no scores are held. In 16 bits o is read and written once more forward, do and o are read once
more backward (on a card with Triton in one pass, `attention.fused.sinks`): 4 bytes a number of o each way, for gpt-oss
with 64 heads of 64 dimensions 33 kB a token and layer. That a softmax needs a place to leave its weight is the finding
of StreamingLLM (Xiao et al., 2309.17453), the learned logit gpt-oss's.
"""

from __future__ import annotations

import torch

from anchorctx.attention.fused import launch

BLOCK = 1024
"""Tokens whose float32 products are held at once, where no fused kernel sums them."""


def merge_sinks(o: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Add the sinks (Hq,) to the softmaxes of o (B, Hq, T, Dv) and lse (B, Hq, T), in place.

    Sinks may have a dtype of their own: they are merged in lse's, float32 at least.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    o.mul_((lse - total).exp_()[..., None])
    lse.copy_(total)


def sinks_gradient(do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The sinks' gradient (Hq,), in their dtype, summed in lse's.

    do and o (B, Hq, T, Dv), lse (B, Hq, T); o and lse as `merge_sinks` left them.
    """
    if lse.dtype is torch.float32 and o.stride(-1) == 1 and launch.serves(do, o, lse, sinks):
        from anchorctx.attention.fused.sinks import sinks_backward

        return sinks_backward(do, o, lse, sinks)
    logits = sinks.to(lse.dtype)[:, None]
    total = lse.new_zeros(sinks.shape)
    for start in range(0, lse.shape[2], BLOCK):
        tokens = slice(start, start + BLOCK)
        delta = (do[:, :, tokens].to(lse.dtype) * o[:, :, tokens]).sum(-1)
        total -= ((logits - lse[:, :, tokens]).exp_() * delta).sum((0, 2))
    return total.to(sinks.dtype)
