"""What is watched while operators run on fake CUDA tensors: copies from the host, and what is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoHostCopies(TorchDispatchMode):
    """Raises where an operator makes a CPU tensor of a CUDA tensor: on a real GPU the host would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, made = ({x.device.type for x in tree_leaves(y) if isinstance(x, torch.Tensor)} for y in (args, result))
        assert not ("cuda" in taken and "cpu" in made), f"{func} copies to the host"
        return result


class Launched(TorchDispatchMode):
    """The operators that launch something on the device: neither a view of a tensor nor fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in FRESH:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FRESH = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten.detach}


class Moved(TorchDispatchMode):
    """The bytes that operators read and write, each tensor once; as a Triton kernel's stand-in, those of its launch."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in FRESH:
            self._count((args, kwargs, result))
        return result

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self._count(args)

    def _count(self, tree: Any) -> None:
        self.bytes += sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
