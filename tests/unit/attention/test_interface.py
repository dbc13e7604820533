from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention import BACKENDS, register
from anchorctx.attention.interface import implementation
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.reference import reference_attention
from anchorctx.errors import BackendUnavailableError, UserError
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.testing.tiny import ARCHITECTURES

T = 12
LAYOUTS = (PackedLayout((0, 1, 5, T), 1), PackedLayout((0, 1, 9, T), 1))


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, T, 8, dtype=dtype) for heads in (4, 2, 2)]


def anchor(name: str = "anchor") -> Callable[..., Any]:
    register()
    return AttentionInterface()[name]


def test_register_is_idempotent_and_names_every_backend() -> None:
    register()
    register()
    names = [implementation(backend) for backend in ("auto", *BACKENDS)]
    assert names[0] == "anchor" and "anchor_cpu" in names
    for name in names:
        assert name in AttentionInterface() and AttentionMaskInterface()[name](batch_size=1) is None


@pytest.mark.parametrize("name", ["anchor", "anchor_cpu", "anchor_reference"])
def test_calls_the_backend_with_scale_and_window(name: str) -> None:
    q, k, v = tensors()
    out, weights = anchor(name)(torch.nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=3, layouts=LAYOUTS)
    expected = reference_attention(q, k, v, LAYOUTS, Score(0.3, 3, None)).transpose(1, 2)
    assert weights is None and (out - expected).abs().max() < 1e-13


def test_softcap_goes_through_or_is_refused_by_name() -> None:
    q, k, v = tensors()
    out, _ = anchor("anchor_reference")(torch.nn.Identity(), q, k, v, None, softcap=2.0, layouts=LAYOUTS)
    expected = reference_attention(q, k, v, LAYOUTS, Score(8**-0.5, None, 2.0)).transpose(1, 2)
    assert (out - expected).abs().max() < 1e-13
    with pytest.raises(BackendUnavailableError, match="'cpu' cannot soft-cap"):
        anchor("anchor_cpu")(torch.nn.Identity(), q, k, v, None, softcap=2.0, layouts=LAYOUTS)


def test_queries_and_keys_are_cast_to_the_values_dtype() -> None:
    q, k, v = tensors(torch.float32)
    out, _ = anchor("anchor_reference")(torch.nn.Identity(), q, k, v.bfloat16(), None, layouts=LAYOUTS)
    expected, _ = anchor("anchor_reference")(
        torch.nn.Identity(), q.bfloat16(), k.bfloat16(), v.bfloat16(), None, layouts=LAYOUTS
    )
    assert out.dtype is torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "Identity with attn_implementation='anchor' needs the forward argument layouts="),
        ({"layouts": LAYOUTS, "dropout": 0.1}, "asks for attention dropout 0.1"),
        ({"layouts": LAYOUTS, "sinks": torch.zeros(2, 4, T, 1)}, "Identity hands sinks to its attention, which no"),
        ({"layouts": LAYOUTS, "position_bias": torch.zeros(1)}, "Identity hands position_bias to its attention"),
    ],
)
def test_what_cannot_be_served_is_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        anchor()(torch.nn.Identity(), *tensors(), None, **kwargs)


def boundaries(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def first_row() -> list[torch.Tensor]:
    return [x[:1] for x in tensors()]


def test_boundaries_of_a_flattened_batch_are_its_layout() -> None:
    found, _ = anchor()(
        torch.nn.Identity(), *first_row(), None, cu_seq_lens_q=boundaries(0, 5, 5, 9, T), max_length_q=5
    )
    expected, _ = anchor()(torch.nn.Identity(), *first_row(), None, layouts=(PackedLayout((0, 5, 9, T)),))
    assert torch.equal(found, expected)


def test_values_that_a_cache_widened_are_cast_back() -> None:
    """transformers' cache, to 5.20, gives values the dtype of the keys, which rotation in float32 leaves in float32."""
    q, k, v = tensors(torch.float32)
    v, module = v.bfloat16(), torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    found, _ = anchor()(module, q, k, v.float(), None, layouts=LAYOUTS)
    expected, _ = anchor()(module, q, k, v, None, layouts=LAYOUTS)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
    mixed, _ = anchor()(module.float(), q, k, v, None, layouts=LAYOUTS)  # as autocast makes them
    assert torch.equal(mixed, expected)


def test_boundaries_are_read_once_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU reading them waits for it, and every layer asks."""
    read: list[list[int]] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(tolist(x)) or tolist(x))
    where, q = boundaries(0, 5, T), first_row()
    first, again = (anchor("anchor_reference")(torch.nn.Identity(), *q, None, cu_seq_lens_q=where) for _ in range(2))
    assert torch.equal(first[0], again[0]) and read == [[0, 5, T]]
    where[1] = 7
    changed, _ = anchor("anchor_reference")(torch.nn.Identity(), *q, None, cu_seq_lens_q=where)
    assert read == [[0, 5, T], [0, 7, T]] and not torch.equal(changed, first[0])
    with torch.inference_mode():
        frozen, _ = anchor("anchor_reference")(torch.nn.Identity(), *q, None, cu_seq_lens_q=boundaries(0, 7, T))
    assert torch.equal(frozen, changed)


@pytest.mark.parametrize("offsets", [(0, 5), (0, 5, T + 1), (3, T)])
def test_boundaries_of_another_batch_are_refused(offsets: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"from {offsets[0]} to {offsets[-1]} for 1 rows of {T} tokens: hand over one"):
        anchor()(torch.nn.Identity(), *first_row(), None, cu_seq_lens_q=boundaries(*offsets))


def test_boundaries_of_several_rows_or_beside_layouts_are_refused() -> None:
    with pytest.raises(UserError, match=f"for 2 rows of {T} tokens: hand over one flattened row"):
        anchor()(torch.nn.Identity(), *tensors(), None, cu_seq_lens_q=boundaries(0, T))
    with pytest.raises(UserError, match="got layouts= and cu_seq_lens_q=.*: pass one of them"):
        anchor()(torch.nn.Identity(), *tensors(), None, cu_seq_lens_q=boundaries(0, T), layouts=LAYOUTS)


def test_a_mask_beside_layouts_is_refused() -> None:
    with pytest.raises(UserError, match="attention mask beside layouts"):
        anchor()(torch.nn.Identity(), *tensors(), torch.zeros(1, 1, T, T), layouts=LAYOUTS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_called_without_layouts_raises(checkpointing: bool, training: bool) -> None:
    """The mask must never vanish silently, whatever the mode."""
    model = ARCHITECTURES["llama"].build().train(training)
    if checkpointing:
        checkpoint_activations(model)
    with pytest.raises(UserError, match="LlamaAttention .* needs the forward argument layouts="):
        model(torch.randint(3, 96, (1, T)))
