"""A packed row equals every document run alone behind the anchor at the same positions, in every architecture.

The packed run goes through `attn_implementation="anchor"`. The runs alone do not touch the package: they use
transformers' own eager attention on anchor + document, with a mask written here.

Tolerance: float64 throughout. Measured over all cases: logits of order 1 differ by at most 1.4e-14, gradients by
6.1e-15 of their tensor's largest entry (or of 1); 1e-12 leaves room for other processors.
"""

from __future__ import annotations

import copy

import pytest
import torch

from anchorctx.attention.interface import implementation
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout, Positions
from anchorctx.models import checkpoint_activations
from anchorctx.testing.tiny import ARCHITECTURES, Architecture, true_float64

TOLERANCE = 1e-12
T = 24
CHECKPOINTING = {"off": None, "non_reentrant": False, "reentrant": True}


def layouts(positions: Positions) -> tuple[PackedLayout, ...]:
    """Two rows with different documents, one of a single token."""
    return PackedLayout((0, 2, 10, 11, T), 2, positions), PackedLayout((0, 2, 7, 19, T), 2, positions)


def mask(tokens: int, anchor: int, window: int | None) -> torch.Tensor:
    """(1, 1, T, T) additive: causal; a window counts the document's own tokens, the anchor is always visible."""
    q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    near = torch.ones_like(q - k, dtype=torch.bool) if window is None else q - k < window
    allowed = (k <= q) & (near | (k < anchor))
    return torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~allowed, float("-inf"))[None, None]


def run_alone(
    model: torch.nn.Module, architecture: Architecture, ids: torch.Tensor, positions: torch.Tensor, anchor: int
) -> torch.Tensor:
    """(T, V) logits of anchor + document through transformers' eager attention."""
    window = getattr(model.config, "sliding_window", None) if architecture.window else None
    full, near = mask(len(ids), anchor, None), mask(len(ids), anchor, window)
    masks = {"full_attention": full, "sliding_attention": near} if architecture.layered_masks else near
    return model(ids[None], position_ids=positions[None], attention_mask=masks, use_cache=False).logits[0]


def run_packed(
    architecture: Architecture, backend: str, rows: tuple[PackedLayout, ...], ids: torch.Tensor, reentrant: bool | None
) -> tuple[torch.nn.Module, torch.Tensor]:
    model = architecture.build(torch.float64, attention=backend)
    if reentrant is not None:
        checkpoint_activations(model, use_reentrant=reentrant)
    positions = torch.stack([row.position_ids() for row in rows])
    return model, model(ids, position_ids=positions, layouts=rows, use_cache=False).logits


def cases() -> list[tuple[str, str, str]]:
    """(architecture, backend, checkpointing): all for the fast backend, and the reference once beside it."""
    found = []
    for name, architecture in ARCHITECTURES.items():
        fast = "reference" if architecture.softcap else "cpu"
        found += [(name, fast, checkpointing) for checkpointing in CHECKPOINTING]
        found += [] if architecture.softcap else [(name, "reference", "off")]
    return found


def assert_same_gradients(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    gradients = dict(expected.named_parameters())
    assert sum(p.grad is not None and p.grad.abs().max() > 1e-4 for p in gradients.values()) > 0.9 * len(gradients)
    for name, parameter in found.named_parameters():
        one, other = parameter.grad, gradients[name].grad
        if one is None or other is None:  # an expert that no token chose
            assert (one is None or not one.any()) and (other is None or not other.any()), name
            continue
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, other.abs().max().item()), name


@pytest.mark.parametrize("positions", list(Positions))
@pytest.mark.parametrize(("name", "backend", "checkpointing"), cases())
def test_packed_row_equals_documents_alone(name: str, backend: str, checkpointing: str, positions: Positions) -> None:
    architecture, rows = ARCHITECTURES[name], layouts(positions)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (2, T), generator=generator)
    cotangent = torch.randn(2, T, 96, dtype=torch.float64, generator=generator)
    with true_float64():
        packed, logits = run_packed(architecture, backend, rows, ids, CHECKPOINTING[checkpointing])
        (logits * cotangent).sum().backward()
        alone = copy.deepcopy(architecture.build(torch.float64))
        alone.set_attn_implementation("eager")
        loss = torch.zeros((), dtype=torch.float64)
        for b, row in enumerate(rows):
            anchor, where = row.anchor_len, row.position_ids()
            for first, (start, stop) in enumerate(zip(row.doc_offsets[1:], row.doc_offsets[2:], strict=False)):
                index = torch.cat([torch.arange(anchor), torch.arange(start, stop)])
                expected = run_alone(alone, architecture, ids[b, index], where[index], anchor)
                assert (logits[b, index] - expected).abs().max() < TOLERANCE
                own = index if first == 0 else index[anchor:]  # the anchor's own logits count once
                loss = loss + (expected[-len(own) :] * cotangent[b, own]).sum()
        loss.backward()
    assert_same_gradients(packed, alone)


def test_softcap_is_refused_by_a_backend_that_cannot() -> None:
    ids = torch.randint(3, 96, (2, T))
    with pytest.raises(BackendUnavailableError, match="'cpu' cannot soft-cap scores.*softcap=5.0"):
        run_packed(ARCHITECTURES["gemma2"], "cpu", layouts(Positions.continuous), ids, None)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.window])
def test_window_changes_the_result_and_keeps_the_anchor(name: str) -> None:
    """The window is really there: a document longer than it differs from full attention, yet depends on the anchor."""
    row, ids = PackedLayout((0, 1, T), 1), torch.randint(3, 96, (1, T), generator=torch.Generator().manual_seed(0))
    model = ARCHITECTURES[name].build(torch.float64, attention="reference")
    other = copy.deepcopy(model)
    for module in other.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = T
    other.config.sliding_window = T
    position_ids = row.position_ids()[None]
    found = model(ids, position_ids=position_ids, layouts=(row,), use_cache=False).logits
    assert (found - other(ids, position_ids=position_ids, layouts=(row,), use_cache=False).logits).abs().max() > 1e-3
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 96
    moved = model(changed, position_ids=position_ids, layouts=(row,), use_cache=False).logits
    assert (found - moved)[0, -1].abs().max() > 1e-4


def test_registered_implementation_names() -> None:
    assert implementation() == "anchor" and implementation("cpu") == "anchor_cpu"
