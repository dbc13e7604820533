"""One kernel in the place of transformers' own rotation, where both are shown to be the same function.

With `rope_dtype=float32`, transformers' operators promote 16-bit q and k to float32 and rotate in several passes, and
attention casts the result back: 34 bytes an element, where `attention.fused.rotation` moves 4. To the last bit the
outcome is the same, gradients included.

An attention module gets a forward of its own, as rotary modules do in `attention.rope`: its class's, with another
meaning of the name `apply_rotary_pos_emb`. The class, its file and every other model of the process stay as they are.
Three questions decide, and where one is answered no, the model rotates as before:

- of the class (`hands_on`): does what it rotated reach attention as it is? Some models scale or normalise it first, in
  float32.
- of the function (`form_of`, `agrees`): does it compute what the kernel computes, and what the kernel computes on this
  card with this Triton? Both are called on small random tensors, once.
- of the call: are q and k in 16 bits, the angles in float32, and all of them on one card?
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch

from anchorctx.attention.fused import launch

logger = logging.getLogger(__name__)

NAME = "apply_rotary_pos_emb"
"""What transformers' models call the function that rotates q and k."""
HALF = (torch.bfloat16, torch.float16)
Several = list[torch.Tensor]
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(q, k, cos, sin): (B, H, T, D) twice and (B or 1, T, R) twice -> q and k, rotated."""


class Form(NamedTuple):
    """What rotations differ in."""

    neighbours: bool
    """Dimensions 2i and 2i + 1 are a pair, else i and i + R/2."""
    rounds_products: bool
    """The gradient's products are rounded to q's dtype before they are added, else only their sum is."""


def hook(model: torch.nn.Module) -> None:
    """Let every attention module of `model` that can do so rotate by the kernel; nothing changes off a card."""
    for module in model.modules():
        if "forward" not in module.__dict__ and hands_on(type(module).forward):
            module.forward = partial(_forward, module)


def unhook(model: torch.nn.Module) -> None:
    """Undo `hook`."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _forward:
            del module.forward


@functools.lru_cache(maxsize=1024)
def hands_on(forward: Callable[..., Any]) -> bool:
    """Does this method rotate q and k, and hand them to attention, and to a cache, as they are? Judged by its source.

    After `q, k = apply_rotary_pos_emb(...)` either name must be nothing but an argument of `attention_interface(...)`
    or of a cache's `update(...)`, which gives k back.
    """
    forward = inspect.unwrap(forward)
    if NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # no source, or none that stands alone
        return False
    rotations = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _calls(node.value) == NAME]
    if len(rotations) != 1:
        return False
    names = {node.id for node in ast.walk(rotations[0].targets[0]) if isinstance(node, ast.Name)}
    later = [node for node in ast.walk(tree) if getattr(node, "lineno", 0) > (rotations[0].end_lineno or 0)]
    taken = {
        id(name)
        for node in later
        if isinstance(node, ast.Call | ast.Assign)
        and _calls(node if isinstance(node, ast.Call) else node.value) in ("attention_interface", "update")
        for name in (node.args if isinstance(node, ast.Call) else ast.walk(node.targets[0]))
    }
    return all(id(node) in taken for node in later if isinstance(node, ast.Name) and node.id in names)


def _calls(node: ast.expr) -> str | None:
    """The name of the function or method that this expression calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", None) or getattr(function, "id", None)


def _forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward, in which `NAME` is `rotate`."""
    forward = type(module).forward
    if not torch.compiler.is_compiling():  # a compiler fuses by itself, and could not follow
        forward = _rebound(forward)
    return forward(module, *args, **kwargs)


def _rebound(forward: Any) -> Callable[..., Any]:
    """A copy of this function, and of the decorators around it, made anew so that it follows changes to either.

    Its globals are a copy too, of some hundred names: in all some microseconds a call.
    """
    inner = getattr(forward, "__wrapped__", None)
    names, cells = forward.__globals__, forward.__closure__
    if inner is None:
        names = {**names, NAME: partial(rotate, names[NAME])}
    else:
        copy = CellType(_rebound(inner))
        cells = tuple(copy if cell.cell_contents is inner else cell for cell in cells)
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def rotate(
    own: Rotation, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`own(q, k, cos, sin, ...)`, or the same by one kernel and cast to q's dtype."""
    form = None if args or kwargs or not _fits(q, k, cos, sin) else form_of(own, q.dtype, q.shape[-1], cos.shape[-1])
    if form is None or not agrees(own, form, q.dtype, q.shape[-1], cos.shape[-1], q.device):
        return own(q, k, cos, sin, *args, **kwargs)
    from anchorctx.attention.fused.rotation import rotate as rotate_fused

    return rotate_fused(q, k, cos, sin, *form)


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Are these q and k (B, H, T, D) in 16 bits, cos and sin (B or 1, T, R) in float32, on one card?"""
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape):
        return False
    (batch, _, tokens, dim), (rows, angles, width) = q.shape, cos.shape
    return (
        q.dtype in HALF
        and k.dtype is q.dtype
        and cos.dtype is sin.dtype is torch.float32
        and not (cos.requires_grad or sin.requires_grad)
        and (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, dim)
        and rows in (1, batch)
        and (angles, width % 2) == (tokens, 0)
        and 0 < width <= dim
        and all(x.stride(-1) == 1 for x in (q, k, cos, sin))
        and launch.serves(q, k, cos, sin)
    )


@functools.lru_cache(maxsize=64)
def form_of(own: Rotation, dtype: torch.dtype, dim: int, width: int) -> Form | None:
    """What `own` does to q and k in 16 bits, `dim` wide, by float32 angles of the first `width` dimensions.

    None where it is nothing that the kernel computes, to the last bit of results and of gradients.
    """
    form = _apart(_compared, own, dtype, dim, width)
    name = f"{getattr(own, '__module__', '')}.{getattr(own, '__name__', own)}"
    logger.info("rotation: %s %s", name, "stays: no kernel computes the same" if form is None else "is fused")
    return form


@functools.lru_cache(maxsize=64)
def agrees(own: Rotation, form: Form, dtype: torch.dtype, dim: int, width: int, device: torch.device) -> bool:
    """Does the kernel give `own`'s results and gradients on this device, to the last bit?"""
    same = _apart(_same_there, own, form, dtype, dim, width, device)
    if not same:
        logger.warning("the fused rotation differs from torch's operators on %s, which are used instead", device)
    return same


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a thread of its own, where gradients are on and no hook or mode of the caller's sees its operators."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def _drawn(dtype: torch.dtype, dim: int, width: int, device: torch.device) -> tuple[Several, Several, Several]:
    """Small random q and k, cosines and sines in float32, and gradients of both."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 16, dim), (2, 1, 16, dim), (2, 16, width), (2, 16, width), (2, 2, 16, dim), (2, 1, 16, dim)]
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn[:2]], drawn[2:4], [x.to(dtype) for x in drawn[4:]]


def _turned(rotate: Rotation, inputs: Several, angles: Several, gradients: Several) -> Several:
    """q and k, rotated, and their gradients."""
    outputs = [x.to(inputs[0].dtype) for x in rotate(*inputs, *angles)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]


def _same_there(own: Rotation, form: Form, dtype: torch.dtype, dim: int, width: int, device: torch.device) -> bool:
    from anchorctx.attention.fused.rotation import rotate as rotate_fused

    given = _drawn(dtype, dim, width, device)
    ours = _turned(lambda q, k, cos, sin: rotate_fused(q, k, cos, sin, *form), *given)
    return all(torch.equal(a, b) for a, b in zip(ours, _turned(own, *given), strict=True))


def _compared(own: Rotation, dtype: torch.dtype, dim: int, width: int) -> Form | None:
    inputs, (cos, sin), gradients = _drawn(dtype, dim, width, torch.device("cpu"))
    try:
        found = _turned(own, inputs, [cos, sin], gradients)
    except Exception:  # whatever a function raises that is asked for what it does not do
        return None
    for form in (Form(a, b) for a in (False, True) for b in (True, False)):
        mine = [rotated(x.detach(), cos, sin, form) for x in inputs]
        mine += [rotated(x, cos, sin, form, backward=True) for x in gradients]
        if all(torch.equal(a, b) for a, b in zip(mine, found, strict=True)):
            return form
    return None


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: Form, *, backward: bool = False
) -> torch.Tensor:
    """What the kernel computes, in plain torch: x (B, H, T, D), or the gradient of what became of it, rotated.

    cos and sin (B or 1, T, R) are in the dtype to calculate in; the result has x's.
    """
    width = cos.shape[-1]
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        _pairs(y, form) for y in (x[..., :width].to(cos.dtype), cos[:, None], sin[:, None])
    )
    if backward:
        terms = [a * cos_a, b * sin_b, b * cos_b, a * sin_a]
        if form.rounds_products:
            terms = [term.to(x.dtype).to(cos.dtype) for term in terms]
        turned = terms[0] + terms[1], terms[2] - terms[3]
    else:
        turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    joined = torch.stack(turned, -1 if form.neighbours else -2).flatten(-2)
    return torch.cat([joined.to(x.dtype), x[..., width:]], -1)


def _pairs(x: torch.Tensor, form: Form) -> tuple[torch.Tensor, ...]:
    """(..., R) -> the first and the second of each pair, (..., R/2) twice."""
    # [0, 1, 2, 3]: neighbours [0, 2] and [1, 3], else [0, 1] and [2, 3]
    return (x.unflatten(-1, (-1, 2)) if form.neighbours else x.unflatten(-1, (2, -1)).mT).unbind(-1)
