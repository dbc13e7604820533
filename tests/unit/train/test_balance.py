"""The load-balancing loss of a step, whatever its pieces; one process here, several in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from anchorctx.attention import register
from anchorctx.layout import PackedLayout
from anchorctx.models.loss import CausalLMLoss
from anchorctx.parallel import dist
from anchorctx.parallel.mesh import Mesh
from anchorctx.parallel.sharder import shard_batch
from anchorctx.testing.tiny import BASE, true_float64
from anchorctx.train.balance import Balance

CPU = torch.device("cpu")
ROW = PackedLayout((0, 1, 10, 17, 18, 33), 1)  # documents of 9, 7, 1 and 15 tokens
IDS = torch.randint(3, 96, (33,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "total", lambda values, device: values)


def mixtral() -> CausalLMLoss:
    register()
    routers = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}
    config = AutoConfig.for_model("mixtral", **BASE | routers)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="anchor").double()
    model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    return CausalLMLoss(model.train())


def batches(max_tokens: int) -> list[dict]:
    """The row in pieces, as the loop hands them to the module; a document of one token is in none."""
    documents = [document for document in ROW.documents() if document.length > 1]
    row = PackedLayout((0, 1, 10, 17, 32), 1)
    index = torch.tensor([0, *(i for document in documents for i in document.where())])
    ids = IDS[index]
    found = []
    for layout, where in [*row.pieces(max_tokens), (PackedLayout((0, 1)), [0])]:  # the last is an empty piece
        piece = ids[torch.as_tensor(where)]
        targets = F.pad(piece[1:], (0, 1), value=-100)[None]
        shard = shard_batch(piece[None], targets, torch.ones(1, len(piece)), (layout,), Mesh(dist.Ranks(0, 1, CPU), 1))
        found.append(shard.arguments(CPU))
    return found


def step(module: CausalLMLoss, balance: Balance, max_tokens: int) -> tuple[float, float, torch.Tensor]:
    """The router's loss that is differentiated, the one that is logged, and its gradients."""
    module.zero_grad()
    pieces = batches(max_tokens)
    balance.begin([ROW])
    with true_float64():
        if balance.fractions is None:
            with torch.no_grad():
                balance.measure([(module(**piece), module.routed)[1] for piece in pieces])  # type: ignore[misc]
        total = 0.0
        for piece in pieces:
            module(**piece)
            assert module.routed is not None
            part = balance.loss(module.routed)
            part.backward()
            total += part.item()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return total, balance.end(), torch.cat(gradients)


def test_pieces_add_up_to_the_models_own_loss_of_the_step() -> None:
    module = mixtral()
    assert module.router is not None
    results = [step(module, Balance(module.router, CPU), size) for size in (100, 20, 10)]
    with true_float64():
        whole = batches(100)[0]
        module.zero_grad()
        body = module.model.base_model(
            **{k: whole[k] for k in ("input_ids", "position_ids", "layouts")}, output_router_logits=True
        )
        own = 0.3 * torch.as_tensor(load_balancing_loss_func(body.router_logits, 4, 2, whole["counted"]))
        own.backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert own.item() > 0.5  # 0.3 * 2 where all experts are used alike
    for differentiated, logged, gradients in results:
        # transformers divides the counts in float32
        assert differentiated == pytest.approx(own.item(), rel=1e-7)
        assert logged == pytest.approx(differentiated, rel=1e-12)
        assert (gradients - expected).abs().max() <= 1e-7 * expected.abs().max()
    assert (results[0][2] - results[2][2]).abs().max() <= 1e-12 * expected.abs().max()


def test_later_steps_take_the_fractions_of_the_step_before() -> None:
    module = mixtral()
    assert module.router is not None
    balance = Balance(module.router, CPU)
    first = step(module, balance, 20)
    kept = balance.fractions
    assert kept is not None and sum(kept) == pytest.approx(2.0)  # each token has two experts
    assert step(module, balance, 10)[0] == pytest.approx(first[0], rel=1e-12)  # the same tokens again
    # a run that goes on from a checkpoint needs no pass to measure, and takes what it is given
    lopsided = Balance(module.router, CPU, [2.0, 0.0, 0.0, 0.0])
    differentiated, logged, _ = step(module, lopsided, 20)
    assert logged == pytest.approx(first[1], rel=1e-12) and abs(differentiated - logged) > 0.01
    assert lopsided.fractions == pytest.approx(kept)
