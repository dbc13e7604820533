"""flash-attn's varlen kernels: FlashAttention-2, -3 or -4, whichever is installed and serves the card.

Their own forward hands out the log-sum-exp and their own backward takes o and lse, which is all that the merge with
the anchor needs. The three packages differ in names and in how they write a window and return gradients:

| | package | module | causal, window w of a token and the w-1 before it | gradients |
|---|---|---|---|---|
| FA2 | flash-attn >= 2.7 | `flash_attn.flash_attn_interface` | `window_size_left=w-1`, -1 is off | written in place |
| FA3 | flash-attn's hopper folder | `flash_attn_interface` | `window_size=(w-1, 0)` or left and right | in place |
| FA4 | flash-attn-4 | `flash_attn.cute.interface` | `window_size_left=w-1`, None is off | returned |

Arguments go by name, and an installed version that lacks one of the names is refused by that name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from anchorctx.attention.kernels.base import Attended, Score, Tile
from anchorctx.attention.kernels.torch_varlen import missing_cuda
from anchorctx.attention.kernels.varlen import Packed, VarlenKernel, pack, unpack
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Release:
    """One of the packages, and which cards and calls its forward and backward serve."""

    name: str
    module: str
    forward: str
    backward: str
    no_window: int | None
    """How its window arguments say that there is no window on the left."""
    needs: Callable[[tuple[int, int], int, float | None], str | None]
    """(compute capability, head dimension, softcap) -> what it needs instead, or None when it serves that."""

    def window(self, score: Score) -> tuple[int | None, int | None]:
        """How many keys before and after itself a query sees; a window implies the causal flag and goes without."""
        return (self.no_window, self.no_window) if score.window is None else (score.window - 1, 0)


def _fa4_needs(capability: tuple[int, int], dim: int, softcap: float | None) -> str | None:
    major = capability[0]
    if major not in (9, 10, 11, 12):
        return "a card of compute capability 9 to 12"
    if major in (10, 11) and 128 < dim != 256:
        return "a head dimension up to 128, or 256"
    if major in (10, 11) and dim == 256 and softcap is not None:
        return "no soft-capping at head dimension 256"
    if major == 12 and (dim > 128 or softcap is not None):
        return "a head dimension up to 128 and no soft-capping"
    return None


def _fa3_needs(capability: tuple[int, int], dim: int, softcap: float | None) -> str | None:
    return None if capability[0] == 9 else "a card of compute capability 9 (Hopper)"


def _fa2_needs(capability: tuple[int, int], dim: int, softcap: float | None) -> str | None:
    return None if capability >= (8, 0) else "a card of compute capability 8.0 or newer"


RELEASES = (
    Release("FA4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd", None, _fa4_needs),
    Release("FA3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", -1, _fa3_needs),
    Release(
        "FA2",
        "flash_attn.flash_attn_interface",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
        -1,
        _fa2_needs,
    ),
)
"""Newest first: the order in which they are tried."""


class FlashAttnKernel(VarlenKernel):
    """See the module docstring; implements `Kernel`."""

    def __init__(self, release: str | None = None, **options: int) -> None:
        """`release`: FA2, FA3 or FA4; None takes the newest that is installed and serves the call."""
        super().__init__(**options)
        self.release = release

    def varlen_forward(self, packed: Packed, tile: Tile, score: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """See `VarlenKernel.varlen_forward`."""
        release, module = _choose(self.release, packed.q, score)
        function = getattr(module, release.forward)
        o, lse, *_ = call(
            function,
            **packed._asdict(),
            **_arguments(release, function, tile, score),
            **({"return_lse": True} if release.name == "FA4" else {}),
        )
        return o, lse

    def varlen_backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `VarlenKernel.varlen_backward`."""
        packed = Packed(*attended[:3])
        release, module = _choose(self.release, packed.q, score)
        function = getattr(module, release.backward)
        arguments = _arguments(release, function, tile, score) | {
            "dout": do,
            "out": attended.o,
            ("lse" if release.name == "FA4" else "softmax_lse"): attended.lse,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if release.name == "FA4":
            dq, dk, dv, *_ = call(function, **packed._asdict(), **arguments)
            return dq, dk, dv
        grads = [x.new_empty(x.shape) for x in packed]
        call(function, **packed._asdict(), **arguments, **dict(zip(("dq", "dk", "dv"), grads, strict=True)))
        return grads[0], grads[1], grads[2]


def call(function: Function, **arguments: Any) -> Any:
    """Call `function` by name; parameters without a default that are not given become None.

    Raises:
        BackendUnavailableError: the function has no parameter of one of the names: another version of the package.
    """
    parameters = _parameters(function)
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise BackendUnavailableError(
            f"the installed flash-attn's {_name(function)} takes no {', '.join(unknown)}: install flash-attn >= 2.7 "
            "or use attention=torch_varlen"
        )
    # Optional tensors (a pre-allocated output, page tables) have no default in some releases.
    absent = {name: None for name, required in parameters.items() if required and name not in arguments}
    return function(**absent, **arguments)


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    *,
    release: str | None = None,
) -> torch.Tensor:
    """The same attention a second, independent way: flash-attn's public function over gathered keys and values.

    A copy of the anchor's key and value goes in front of each document; flash-attn aligns a causal mask with the
    bottom right corner, so that every query sees the copy. Shapes as `merge.anchor_attention`; differentiable by
    flash-attn and by autograd's gather, which sums the copies' gradients. A cross-check: it copies keys and values.

    Raises:
        ValueError: a window together with an anchor, which the public function would hide.
    """
    if score.window is not None and layouts[0].anchor_len:
        raise ValueError(f"gathered keys cannot keep the anchor visible beyond a window of {score.window} tokens")
    chosen, module = _choose(release, query, score)
    function = module.flash_attn_varlen_func
    index, queries, keys = (x.to(query.device) for x in _gathered(layouts))
    out = call(
        function,
        q=pack(query),
        k=pack(key)[index],
        v=pack(value)[index],
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        max_seqlen_q=int(queries.diff().max()),
        max_seqlen_k=int(keys.diff().max()),
        softmax_scale=score.scale,
        causal=score.window is None,
        window_size=chosen.window(score),
        softcap=score.softcap or 0.0,
    )
    return unpack(out[0] if isinstance(out, tuple) else out, query)


def _gathered(layouts: Sequence[PackedLayout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the keys to gather from the batch's tokens, and boundaries of queries and of gathered keys (int32)."""
    # anchor 0, documents 1-2 and 3-5: index [0, 0, 1, 2, 0, 3, 4, 5], queries [0, 1, 3, 6], keys [0, 1, 4, 8]
    length = layouts[0].length
    index = [torch.from_numpy(layout.kv_index_array()) + row * length for row, layout in enumerate(layouts)]
    queries = [torch.from_numpy(layout.cu_seqlens_array()).diff() for layout in layouts]
    keys = [torch.from_numpy(layout.cu_seqlens_k_array()).diff() for layout in layouts]
    return torch.cat(index), _boundaries(queries), _boundaries(keys)


def _boundaries(lengths: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cat(list(lengths)).cumsum(0, dtype=torch.int32), (1, 0))


def _arguments(release: Release, function: Function, tile: Tile, score: Score) -> dict[str, Any]:
    """What forward and backward share, under the names that `function` has for it."""
    parameters = _parameters(function)
    left, right = release.window(score)
    tupled = "window_size" in parameters
    return {
        "cu_seqlens_q": tile.cu_seqlens,
        "cu_seqlens_k": tile.cu_seqlens,
        "max_seqlen_q": tile.max_seqlen,
        "max_seqlen_k": tile.max_seqlen,
        "softmax_scale": score.scale,
        "softcap": score.softcap or 0.0,
        # FA3's operators call the backward's flag is_causal.
        "is_causal" if "is_causal" in parameters else "causal": score.window is None,
        **({"window_size": (left, right)} if tupled else {"window_size_left": left, "window_size_right": right}),
        **({"dropout_p": 0.0} if release.name == "FA2" else {}),
    }


def _choose(wanted: str | None, q: torch.Tensor, score: Score) -> tuple[Release, ModuleType]:
    """The newest release that is installed and serves the call, or the wanted one; raises BackendUnavailableError."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    chosen = _select(wanted, capability, q.shape[-1], score.softcap)
    if isinstance(chosen, str):
        raise BackendUnavailableError(f"no flash-attn kernel serves this call, it {chosen}: use attention=torch_varlen")
    module = _module(chosen.module)
    assert module is not None
    return chosen, module


@functools.lru_cache(maxsize=64)
def _select(wanted: str | None, capability: tuple[int, int] | None, dim: int, softcap: float | None) -> Release | str:
    """The release to call, or why there is none, as the end of a sentence."""
    refusals = []
    for release in RELEASES:
        if wanted not in (None, release.name) or _module(release.module) is None:
            continue
        need = None if capability is None else release.needs(capability, dim, softcap)
        if need is None:
            return release
        refusals.append(f"has {release.name}, which needs {need}")
    return "; ".join(refusals) or f"needs {wanted or 'flash-attn'}, which is not installed"


@functools.lru_cache(maxsize=8)
def _module(name: str) -> ModuleType | None:
    """The module, imported, or None where it is not installed; an installed package that is broken raises."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except ModuleNotFoundError:  # a parent package is not installed
        return None
    return importlib.import_module(name)


@functools.lru_cache(maxsize=64)
def _parameters(function: Function) -> dict[str, bool]:
    """The function's parameters, and whether each must be given."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:  # a torch.library.custom_op hides its signature, but has a schema
        return {argument.name: not argument.has_default_value() for argument in operator._schema.arguments}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}


def _name(function: Function) -> str:
    return getattr(function, "__name__", None) or getattr(function, "_name", repr(function))


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """What this backend lacks here, as the end of a sentence; None when it can be called."""
    reason = missing_cuda((8, 0))
    if reason is not None:
        return reason
    try:
        installed = [release for release in RELEASES if _module(release.module) is not None]
    except ImportError as error:  # built for another torch or CUDA
        return f"finds flash-attn, but it cannot be imported ({error}): reinstall it for torch {torch.__version__}"
    if not installed:
        return "needs the flash-attn package, which is not installed (pip install anchorctx[flash])"
    return None


def limits(query: torch.Tensor, score: Score) -> str | None:
    """Why no installed release serves this call on this card, as the end of a sentence; None when one does."""
    chosen = _select(None, torch.cuda.get_device_capability(query.device), query.shape[-1], score.softcap)
    return chosen if isinstance(chosen, str) else None
