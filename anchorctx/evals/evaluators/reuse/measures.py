"""How near an arm comes to dense: divergence of its answers, errors of its cache, and paired accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.turn import Turn

Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One turn of an arm against dense, on the same words."""

    kl: np.ndarray
    """(n,) nats, KL(dense | arm) of the distribution before each token."""
    agree: np.ndarray
    """(n,) bool: the same most probable token."""


def closeness(dense: Turn, other: Turn) -> Closeness:
    """Compare the logits that both turns gave to the same answer, in float64."""
    p, q = (turn.logits.double().log_softmax(-1) for turn in (dense, other))
    # (n, V) log-probabilities; rounding can take a sum that should be 0 a little below it.
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
    agree = dense.logits.argmax(-1) == other.logits.argmax(-1)
    return Closeness(kl.cpu().numpy(), agree.cpu().numpy())


@dataclass(frozen=True, slots=True)
class KvError:
    """By layer and part: how far one cache is from another. Arrays (2, L), keys first."""

    relative: np.ndarray
    """|a - b| / |b|, Frobenius norms over all tokens and heads."""
    cosine: np.ndarray
    """Mean over tokens and heads of the cosine between their vectors."""


def kv_error(found: KV, true: KV) -> KvError:
    """`found` against `true`, both un-rotated or both rotated at the same place."""
    relative, cosine = [], []
    for a, b in ((found.keys, true.keys), (found.values, true.values)):
        a, b = a.double(), b.double()  # (L, B, H, T, D)
        relative.append((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))
        cosine.append(torch.nn.functional.cosine_similarity(a, b, dim=-1).flatten(1).mean(1))
    return KvError(torch.stack(relative).cpu().numpy(), torch.stack(cosine).cpu().numpy())


def turn_error(dense: Turn, other: Turn) -> KvError | None:
    """Over the contents of all placeholders, at their places in the prompt; None when there are none."""
    spans = [(s.start, s.stop) for s in dense.prompt.placeholders if s.length]
    if not spans:
        return None
    # Spans (3, 5) and (9, 12): index = [3, 4, 9, 10, 11].
    index = torch.cat([torch.arange(a, b) for a, b in spans])
    a, b = (
        KV(turn.buffer.keys[:, :, :, index], turn.buffer.values[:, :, :, index], 0)  # same slots, so the same rotation
        for turn in (other, dense)
    )
    return kv_error(a, b)


def context_error(
    decoder: Decoder, document: Sequence[int], before: Sequence[int], other: Sequence[int], bos: int
) -> tuple[KvError, KvError]:
    """How a document's un-rotated KV varies: with the text before it, at one place; and with its place, alone.

    Args:
        decoder: the model.
        document: its tokens.
        before, other: two texts of the same length to stand before it, behind BOS.
        bos: the first token.

    Returns:
        (content, shift): behind `other` against behind `before`; and `len(before)` positions further off, still behind
        `before`, whose own place is unchanged.
    """
    # `real` is the reference: behind BOS and `before`. `foreign` has the same positions behind another text; `moved`
    # has the same text before it, then a gap of len(before) positions.
    ids, length = decoder.tensor(document), len(before) + 1
    first, second = (decoder.encode(decoder.tensor([bos, *text])) for text in (before, other))
    real = decoder.rope.unrotated(decoder.encode(ids, position=length, behind=first))
    foreign = decoder.rope.unrotated(decoder.encode(ids, position=length, behind=second))
    moved = decoder.rope.unrotated(decoder.encode(ids, position=length + len(before), behind=first))
    return kv_error(foreign, real), kv_error(moved, real)


def paired_difference(arm: Sequence[bool], dense: Sequence[bool]) -> tuple[float, float, float]:
    """Accuracy of `arm` minus that of `dense` on the same problems, with a 95 % interval (Agresti and Min, 2005).

    Half an observation is added to each cell of the paired table, so that the interval does not vanish when all pairs
    agree.
    """
    # The arm alone solves `better` problems and dense alone `worse`; the difference is (better - worse) / n.
    better = sum(a and not d for a, d in zip(arm, dense, strict=True))
    worse = sum(d and not a for a, d in zip(arm, dense, strict=True))
    n = len(arm)
    b, w, total = better + 0.5, worse + 0.5, n + 2.0
    centre = (b - w) / total
    half = Z * math.sqrt(b + w - (b - w) ** 2 / total) / total
    return (better - worse) / n, max(centre - half, -1.0), min(centre + half, 1.0)
