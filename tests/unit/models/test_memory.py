"""Each memory switch leaves the loss and every gradient as they were, in float64; and mistakes are refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations, offload
from anchorctx.models.config import ActivationStore, LossKind, MemoryConfig
from anchorctx.models.loss import CausalLMLoss
from anchorctx.models.memory import saving
from anchorctx.models.offload import FolderStore, Offload, PinnedStore, check_space
from anchorctx.models.tiled_mlp import tile_mlps
from anchorctx.testing.tiny import ARCHITECTURES, true_float64

LAYOUT = PackedLayout((0, 1, 9, 30), 1)
DENSE = [name for name, architecture in ARCHITECTURES.items() if not architecture.experts]


def build(name: str = "llama", **fields: object) -> PreTrainedModel:
    backend = "reference" if ARCHITECTURES[name].softcap else "cpu"
    return ARCHITECTURES[name].build(torch.float64, attention=backend)


def gradients(model: PreTrainedModel, **options: object) -> dict[str, torch.Tensor]:
    """The loss under "loss" and every parameter's gradient, of two rows."""
    ids = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(0))
    with true_float64():
        loss = CausalLMLoss(model, **options)(ids, LAYOUT.position_ids().repeat(2, 1), (LAYOUT,) * 2, ids)  # type: ignore[arg-type]
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("recompute", [False, True])
def test_tiled_mlps(name: str, recompute: bool) -> None:
    expected = gradients(build(name))
    model = build(name)
    if recompute:
        checkpoint_activations(model)
    tile_mlps(model, 7)  # 60 tokens: the last tile is shorter
    assert_same(gradients(model), expected)


def test_tiles_that_hold_all_tokens_change_nothing_at_all() -> None:
    model = build()
    expected = gradients(build())
    tile_mlps(model, 60)
    found = gradients(model)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_an_mlp_never_sees_more_than_a_tile() -> None:
    model = build()
    seen = []
    tile_mlps(model, 16)
    for name, module in model.named_modules():
        if name.endswith("mlp.gate_proj"):
            module.register_forward_hook(lambda _, x, out: seen.append(x[0].shape[0]))
    gradients(model)
    assert max(seen) == 16 and len(seen) == 2 * 2 * 4  # two layers, forward and again backward, four tiles


def test_experts_are_refused() -> None:
    with pytest.raises(UserError, match="mlp_tile=16 cannot cut the experts of mixtral"):
        tile_mlps(ARCHITECTURES["mixtral"].build(), 16)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_every_nth_layer(every: int) -> None:
    model = build()
    checkpoint_activations(model, every=every)
    assert_same(gradients(model), gradients(build()))


def test_every_second_layer_means_every_second_layer() -> None:
    model = build()
    calls = [0, 0]
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    checkpoint_activations(model, every=2)
    gradients(model)
    assert calls == [2, 1]  # the first runs again in the backward pass


def test_the_loss_in_tiles_is_the_whole_rows() -> None:
    assert_same(gradients(build(), kind=LossKind.tiled, tile_tokens=5), gradients(build(), kind=LossKind.whole))


@pytest.mark.parametrize("every", [1, 2])
def test_activations_that_wait_in_files_or_memory(every: int, tmp_path: Path) -> None:
    expected = gradients(build())
    for store in (FolderStore(tmp_path), PinnedStore(torch.device("cpu"))):
        model = build()
        checkpoint_activations(model, every=every)
        taken: list[torch.Size] = []
        put = store.put
        store.put = lambda tensor, put=put, taken=taken: (taken.append(tensor.shape), put(tensor))[1]  # type: ignore[method-assign]
        found = gradients(model, saving=Offload(store, smallest_bytes=1))
        assert all(found[name].equal(value) for name, value in gradients_of(every).items())
        assert_same(found, expected)
        assert taken.count(torch.Size([2, 30, 32])) >= 1
        if every == 1:
            assert taken.count(torch.Size([2, 30, 32])) >= 2  # each layer's input
    assert not list(tmp_path.rglob("[0-9]*"))  # every file was read and removed


def gradients_of(every: int) -> dict[str, torch.Tensor]:
    model = build()
    checkpoint_activations(model, every=every)
    return gradients(model)


def test_parameters_and_small_tensors_stay() -> None:
    class Refuses:
        def put(self, tensor: torch.Tensor) -> None:
            raise AssertionError(f"moved {tuple(tensor.shape)}")

        def get(self, kept: None) -> torch.Tensor:
            raise AssertionError

    weight = torch.nn.Parameter(torch.randn(64, 64))
    with Offload(Refuses(), smallest_bytes=64 * 64 * 4)():
        (torch.randn(4, 64) @ weight.T).sum().backward()
    assert weight.grad is not None


def test_a_step_that_was_never_finished_leaves_no_files(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(torch.ones(8))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    x = torch.randn(3, 5).bfloat16()
    store = FolderStore(tmp_path)
    assert store.get(store.put(x.T)).equal(x.T)


def test_on_a_cpu_there_is_nothing_to_offload_to(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryConfig(offload_activations=ActivationStore.cpu, checkpoint_every=1)
    assert saving(memory, torch.device("cpu")) is nullcontext
    assert "the activations are in CPU memory already" in caplog.text


def test_a_folder_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    check_space(tmp_path / "new", 10**9)
    with pytest.raises(UserError, match="has 1.0 GB free, but .* need 2.0 GB: name a folder with more space"):
        check_space(tmp_path / "new", 2 * 10**9)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        (MemoryConfig(mlp_tile=5), "mlp_tile=5 must be 0 or at least 128"),
        (MemoryConfig(checkpoint_every=-1), "checkpoint_every=-1 must be at least 0"),
        (MemoryConfig(loss_tile=0), "loss_tile=0 must be at least 1"),
        (
            MemoryConfig(offload_activations=ActivationStore.folder),
            "=folder does not go with memory.offload_folder=None",
        ),
        (MemoryConfig(offload_folder="x"), "=device does not go with memory.offload_folder=x"),
    ],
)
def test_settings_that_cannot_be_meant(memory: MemoryConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        memory.validate()


def test_offloading_what_is_not_recomputed() -> None:
    memory = MemoryConfig(offload_activations=ActivationStore.cpu)
    with pytest.raises(UserError, match="none is recomputed: set memory.checkpoint_every=1"):
        memory.validate()
    memory.checkpoint_every = 3
    memory.validate()
