"""Plain-torch stand-ins for the CUDA flash kernels: torch's own operators and flash-attn 2, 3 and 4.

Each stand-in has the real function's signature, recorded here from the package named beside it, and its contract:
varlen sequences, a causal mask aligned with the bottom right corner, windows, soft-capping, what is returned and what
is written in place, and which arguments the real code would reject. Numbers come from dense attention, document by
document, in the inputs' own dtype; the log-sum-exp is float32 as the kernels' is, or float64 for float64 inputs, so
that plumbing can be checked to float64's precision. Backward takes o and lse as given and does not recompute them:
that is what the merge with the anchor relies on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# Parameter names in order; "name=" has a default. Recorded with inspect from the packages' own Python files.
RECORDED: dict[str, dict[str, str]] = {
    # flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py
    "FA2": {
        "_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
        "softmax_scale causal window_size_left=-1 window_size_right=-1 softcap=0.0 alibi_slopes=None "
        "return_softmax=False block_table=None leftpad_k=None seqused_k=None zero_tensors=False",
        "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q "
        "max_seqlen_k dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
        "deterministic rng_state=None zero_tensors=False",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 "
        "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False "
        "return_attn_probs=False block_table=None",
    },
    # flash_attn_3 3.0.0.b1, the hopper folder of flash-attn 2.8.3.post2: hopper/flash_attn_interface.py
    "FA3": {
        "_flash_attn_forward": "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q "
        "seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary "
        "q_descale k_descale v_descale softmax_scale causal window_size=(-1,-1) attention_chunk=0 softcap=0.0 "
        "rotary_interleaved=True scheduler_metadata=None num_splits=1 pack_gqa=None sm_margin=0",
        "_flash_attn_backward": "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q "
        "max_seqlen_k dq dk dv softmax_scale causal window_size=(-1,-1) softcap=0.0 deterministic=False sm_margin=0",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None "
        "seqused_k=None softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
        "window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0",
    },
    # later FA3, whose functions are torch custom operators: names and defaults differ
    "FA3 operators": {
        "_flash_attn_forward": "q k v k_new=None v_new=None qv=None out_=None cu_seqlens_q=None cu_seqlens_k=None "
        "cu_seqlens_k_new=None seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None page_table=None "
        "kv_batch_idx=None leftpad_k=None rotary_cos=None rotary_sin=None seqlens_rotary=None q_descale=None "
        "k_descale=None v_descale=None softmax_scale=None causal=False window_size_left=-1 window_size_right=-1 "
        "attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=1 pack_gqa=None "
        "sm_margin=0",
        "_flash_attn_backward": "dout q k v out softmax_lse cu_seqlens_q=None cu_seqlens_k=None sequed_q=None "
        "sequed_k=None max_seqlen_q=None max_seqlen_k=None dq=None dk=None dv=None softmax_scale=None "
        "is_causal=False window_size_left=-1 window_size_right=-1 softcap=0.0 deterministic=False sm_margin=0",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None "
        "seqused_k=None softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
        "window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False "
        "sm_margin=0 return_attn_probs=False",
    },
    # flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
    "FA4": {
        "_flash_attn_fwd": "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None "
        "max_seqlen_q=None max_seqlen_k=None min_seqlen_k=None page_table=None softmax_scale=None causal=False "
        "softcap=None window_size_left=None window_size_right=None learnable_sink=None tile_mn=None mma_pv_is_rs=None "
        "intra_wg_overlap=None num_threads=384 num_splits=1 pack_gqa=None _arch=None score_mod=None mask_mod=None "
        "block_sparse_tensors=None return_lse=False out=None lse=None aux_tensors=None aux_scalars=None q_descale=None "
        "k_descale=None v_descale=None gather_kv_indices=None scheduler_metadata=None seqlen_k_per_split=None "
        "disable_scheduler_metadata=False gather_bwd_recompute_p=False",
        "_flash_attn_bwd": "q k v out dout lse softmax_scale=None causal=False softcap=0.0 window_size_left=None "
        "window_size_right=None m_block_size=64 n_block_size=128 num_threads=256 pack_gqa=False num_stages_Q=2 "
        "num_stages_dO=2 SdP_swapAB=False dKV_swapAB=False dQ_swapAB=False AtomLayoutMSdP=2 AtomLayoutNdKV=2 "
        "AtomLayoutMdQ=2 V_in_regs=False cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None "
        "max_seqlen_q=None max_seqlen_k=None deterministic=False dq=None dk=None dv=None score_mod=None "
        "score_mod_bwd=None mask_mod=None aux_tensors=None aux_scalars=None block_sparse_tensors=None dlse=None "
        "learnable_sink=None",
        "flash_attn_varlen_func": "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None "
        "max_seqlen_k=None min_seqlen_k=None seqused_q=None seqused_k=None gather_kv_indices=None page_table=None "
        "softmax_scale=None causal=False window_size=(None,None) learnable_sink=None softcap=0.0 num_splits=1 "
        "pack_gqa=None deterministic=False score_mod=None score_mod_bwd=None mask_mod=None block_sparse_tensors=None "
        "aux_tensors=None aux_scalars=None return_lse=False scheduler_metadata=None seqlen_k_per_split=None "
        "disable_scheduler_metadata=False gather_bwd_recompute_p=False gather_bwd_token_chunk=None",
    },
}
VERSIONS = {"FA2": "2.8.3.post2", "FA3": "3.0.0.b1", "FA4": "4.0.0b36"}
"""The recorded versions; "FA3 operators" has no release of its own."""
MODULES = {
    "FA2": "flash_attn.flash_attn_interface",
    "FA3": "flash_attn_interface",
    "FA3 operators": "flash_attn_interface",
    "FA4": "flash_attn.cute.interface",
}

OFF = (None, 0.0, 0, False, ())
"""Values that mean "off" for every argument the stand-ins do not compute."""
USED = {"q", "k", "v", "out", "lse", "softmax_lse", "dout", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k"} | {
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "is_causal",
    "window_size",
    "window_size_left",
    "window_size_right",
    "softcap",
    "deterministic",
    "return_lse",
}
"""Arguments that the stand-ins compute with."""


@dataclass
class Recorder:
    """What the stand-ins of one package were called with."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of one function."""
        return [arguments for called, arguments in self.calls if called == name]


@dataclass(frozen=True)
class Sequences:
    """One varlen call: scores `softcap * tanh(scale * q.k / softcap)`, keys from `left` before to `right` after."""

    queries: torch.Tensor
    keys: torch.Tensor
    scale: float
    left: int | None
    right: int | None
    softcap: float

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each sequence."""
        queries, keys = self.queries.tolist(), self.keys.tolist()
        for i in range(len(queries) - 1):
            yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (H, n, m) of one sequence, -inf where masked, and their derivative by `scale * q.k`."""
        s = q.transpose(0, 1) @ k.permute(1, 2, 0) * self.scale
        slope = torch.ones_like(s)
        if self.softcap:
            s = torch.tanh(s / self.softcap) * self.softcap
            slope = 1 - (s / self.softcap) ** 2
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None, :]
        banned = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            banned |= distance > self.left
        if self.right is not None:
            banned |= distance < -self.right
        return s.masked_fill(banned, float("-inf")), slope

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """o (N, Hq, D) and lse (Hq, N)."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        o = q.new_full(q.shape, float("nan"))
        lse = q.new_full((q.shape[1], q.shape[0]), float("nan"), dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys in self.spans():
            s, _ = self.scores(q[rows], k[keys])
            lse[:, rows] = torch.logsumexp(s, -1)
            o[rows] = (torch.softmax(s, -1) @ v[keys].transpose(0, 1)).transpose(0, 1)
        return o, lse

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk, dv: P = exp(s - lse) and D = rowsum(do * o) from the lse and o that are given."""
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        dq, dk, dv = torch.full_like(q, float("nan")), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in self.spans():
            s, slope = self.scores(q[rows], k[keys])
            p = (s - lse[:, rows, None]).exp().to(q.dtype)
            dp = do[rows].transpose(0, 1) @ v[keys].permute(1, 2, 0)
            delta = (do[rows] * o[rows]).sum(-1).transpose(0, 1)[..., None]
            ds = p * (dp - delta) * slope * self.scale
            dq[rows] = (ds @ k[keys].transpose(0, 1)).transpose(0, 1)
            dk[keys] += (ds.mT @ q[rows].transpose(0, 1)).transpose(0, 1)
            dv[keys] += (p.mT @ do[rows].transpose(0, 1)).transpose(0, 1)
        return dq, *(x.unflatten(1, (heads, groups)).sum(2) for x in (dk, dv))


def check_tensors(sequences: Sequences, longest: tuple[int, int], *tensors: torch.Tensor) -> None:
    """What the real code checks before it launches: dtypes, shapes, strides, boundaries."""
    for cu_seqlens, total, bound in zip(
        (sequences.queries, sequences.keys), (tensors[0].shape[0], tensors[1].shape[0]), longest, strict=True
    ):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == total and type(bound) is int
        assert int(cu_seqlens.diff().max()) == bound
    for x in tensors:
        assert x.dim() == 3 and x.dtype == tensors[0].dtype and x.stride(-1) == 1 and x.shape[-1] % 8 == 0
        assert all(x.stride(i) % 8 == 0 for i in (0, 1))  # 16 bytes of a half-precision number, as vector loads need


def stand_in(package: str, recorder: Recorder) -> ModuleType:
    """The package's interface module, its functions with the recorded signatures; calls are noted in `recorder`."""
    module = ModuleType(MODULES[package])
    for name, signature in RECORDED[package].items():
        body = {"f": _varlen_func, "_": _backward if "_b" in name.removeprefix("_flash_attn") else _forward}[name[0]]
        setattr(module, name, _with_signature(name, signature, _noting(recorder, package, name, body)))
    return module


def _noting(recorder: Recorder, package: str, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    def noted(**arguments: Any) -> Any:
        recorder.calls.append((name, arguments))
        for key, value in arguments.items():
            default = f"{key}={value}".replace(" ", "") in RECORDED[package][name].split()
            assert key in USED or default or value in OFF, f"{name} got {key}={value}"
        return body(package, arguments)

    return noted


def _with_signature(name: str, signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the recorded signature that calls `function` by keyword."""
    names = [part.split("=")[0] for part in signature.split()]
    scope: dict[str, Any] = {"function": function}
    source = f"def {name}({', '.join(signature.split())}): return function({', '.join(f'{n}={n}' for n in names)})"
    exec(source, scope)
    return scope[name]


def _sequences(package: str, arguments: dict[str, Any]) -> Sequences:
    left, right = arguments.get("window_size") or (arguments["window_size_left"], arguments["window_size_right"])
    if package == "FA4":  # None is off; only a pair of negative numbers is off too
        left, right = (None, None) if None not in (left, right) and left < 0 and right < 0 else (left, right)
        assert left is None or left >= 0, "FA4 takes a single negative bound for a window"
    else:
        left, right = (None if x < 0 else x for x in (left, right))
    if arguments.get("causal") or arguments.get("is_causal"):
        right = 0
    return Sequences(
        arguments["cu_seqlens_q"],
        arguments["cu_seqlens_k"],
        arguments["softmax_scale"],
        left,
        right,
        arguments["softcap"] or 0.0,
    )


def _checked(package: str, arguments: dict[str, Any], *extra: torch.Tensor) -> tuple[Sequences, list[torch.Tensor]]:
    sequences, tensors = _sequences(package, arguments), [arguments[name] for name in "qkv"]
    check_tensors(sequences, (arguments["max_seqlen_q"], arguments["max_seqlen_k"]), *tensors, *extra)
    return sequences, tensors


def _forward(package: str, arguments: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    sequences, tensors = _checked(package, arguments)
    o, lse = sequences.forward(*tensors)
    extra = {"FA2": (o.new_empty(0), o.new_empty(2)), "FA4": (None, None, None)}.get(package, (None, None))
    if package == "FA4" and not arguments["return_lse"]:
        return (o, None, *extra)
    return (o, lse, *extra)


def _backward(package: str, arguments: dict[str, Any]) -> Any:
    do, o = arguments["dout"], arguments["out"]
    lse = arguments["lse" if package == "FA4" else "softmax_lse"]
    sequences, tensors = _checked(package, arguments, do, o)
    assert lse.shape == (o.shape[1], o.shape[0]) and lse.is_contiguous()
    assert lse.dtype == torch.promote_types(o.dtype, torch.float32)
    grads = sequences.backward(do, *tensors, o, lse)
    if package == "FA4":
        return grads
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        arguments[name].copy_(grad)
    softmax_d = lse.new_empty(0)
    return (
        softmax_d if package in ("FA2", "FA3 operators") else (*(arguments[n] for n in ("dq", "dk", "dv")), softmax_d)
    )


def _varlen_func(package: str, arguments: dict[str, Any]) -> Any:
    sequences, tensors = _checked(package, arguments)
    o, lse = _Varlen.apply(*tensors, sequences)
    return (o, lse if arguments["return_lse"] else None) if package == "FA4" else o


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences) -> Any:
        o, lse = sequences.forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.sequences = sequences
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor, _: torch.Tensor) -> Any:
        return *ctx.sequences.backward(do, *ctx.saved_tensors), None


def install(monkeypatch: Any, package: str, recorder: Recorder) -> None:
    """Make the stand-in importable under the package's own name for the length of a test."""
    name = MODULES[package]
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = ModuleType(".".join(parts[:i]))
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
    module = stand_in(package, recorder)
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)


# -- torch's own operators --------------------------------------------------------------------------------------------


def aten_stand_in(recorder: Recorder) -> SimpleNamespace:
    """`torch.ops.aten` with plain-torch flash operators that take exactly what torch's schema says."""
    return SimpleNamespace(
        _flash_attention_forward=_aten_forward(recorder), _flash_attention_backward=_aten_backward(recorder)
    )


def _aten_arguments(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, as torch's own schema has them: a wrong count, name or type raises."""
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert len(args) == len(names) and set(kwargs) <= {a.name for a in schema.arguments if a.kwarg_only}
    return dict(zip(names, args, strict=True)) | kwargs


def _aten_sequences(a: dict[str, Any]) -> Sequences:
    # What FlashAttention-4 takes too, where it stands behind these operators: causal without a window, or a window.
    left, right = a.get("window_size_left"), a.get("window_size_right")
    assert a["dropout_p"] == 0.0 and (left is None) == (right is None) == a["is_causal"]
    return Sequences(a["cum_seq_q"], a["cum_seq_k"], a["scale"], left, 0 if a["is_causal"] else right, 0.0)


def _aten_forward(recorder: Recorder) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        a = _aten_arguments("_flash_attention_forward", args, kwargs)
        recorder.calls.append(("forward", a))
        sequences, qkv = _aten_sequences(a), (a["query"], a["key"], a["value"])
        check_tensors(sequences, (a["max_q"], a["max_k"]), *qkv)
        return *sequences.forward(*qkv), torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    return forward


def _aten_backward(recorder: Recorder) -> Callable[..., Any]:
    def backward(*args: Any, **kwargs: Any) -> Any:
        a = _aten_arguments("_flash_attention_backward", args, kwargs)
        recorder.calls.append(("backward", a))
        sequences, qkv = _aten_sequences(a), (a["query"], a["key"], a["value"])
        check_tensors(sequences, (a["max_q"], a["max_k"]), *qkv, a["grad_out"], a["out"])
        assert a["logsumexp"].shape == (qkv[0].shape[1], qkv[0].shape[0]) and a["logsumexp"].is_contiguous()
        return sequences.backward(a["grad_out"], *qkv, a["out"], a["logsumexp"])

    return backward
