"""An engine of one process that holds what DeepSpeed's does under ZeRO 2, without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Address(SimpleNamespace):
    """Where a parameter lies in a flat tensor."""

    start: int
    numel: int


class Model(nn.Module):
    """A matrix with a second name, a vector, and a buffer that belongs to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))
        self.head = self.matrix
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class FakeEngine:
    """Trains a `Model` with torch's AdamW on one flat float32 tensor."""

    def __init__(self) -> None:
        model = Model()
        self.module = SimpleNamespace(model=model)
        self.group: list[Any] = [model.matrix, model.vector]
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in self.group]))
        adam = torch.optim.AdamW([self.flat], lr=0.1)
        self.optimizer: Any = SimpleNamespace(
            optimizer=adam,
            bit16_groups=[self.group],
            single_partition_of_fp32_groups=[self.flat],
            update_lp_params=self.update_model,
        )
        offset = 0
        for parameter in self.group:
            place = Address(start=offset, numel=parameter.numel())
            parameter._hp_mapping = SimpleNamespace(
                get_hp_fragment_address=lambda place=place: place,
                lp_fragment_address=Address(start=0, numel=parameter.numel()),
            )
            offset += parameter.numel()
        self.global_steps = 0

    def zero_optimization_stage(self) -> int:
        return 2

    def train_step(self) -> None:
        """An update with a random gradient."""
        self.flat.grad = torch.randn_like(self.flat)
        self.optimizer.optimizer.step()
        self.update_model()

    @torch.no_grad()
    def update_model(self) -> None:
        """Copy the flat weights to the model's."""
        for parameter in self.group:
            place = parameter._hp_mapping.get_hp_fragment_address()
            parameter.copy_(self.flat.narrow(0, place.start, place.numel).view_as(parameter))

    def everything(self) -> list[torch.Tensor]:
        """All numbers that an update depends on, and the model's own."""
        state = self.optimizer.optimizer.state[self.flat]
        kept = [self.module.model.counts, *self.module.model.parameters()]
        return [tensor.detach().clone() for tensor in (self.flat, *map(state.get, ("exp_avg", "exp_avg_sq")), *kept)]
