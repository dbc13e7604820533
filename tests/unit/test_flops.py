import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from anchorctx.flops import ModelFlops, head_dims, layer_windows, peak_flops
from anchorctx.layout import PackedLayout
from anchorctx.testing.tiny import ARCHITECTURES

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}


def model_of(model_type, **fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **fields))


def test_matrices_count_twice_forward_and_the_embedding_table_does_not():
    flops = ModelFlops.of(model_of("llama", num_key_value_heads=2, tie_word_embeddings=False))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert flops.per_token == 6 * (3 * layer + 32 * 50)


def test_a_tied_head_counts_once():
    tied = ModelFlops.of(model_of("llama", tie_word_embeddings=True))
    untied = ModelFlops.of(model_of("llama", tie_word_embeddings=False))
    assert tied.per_token == untied.per_token


def test_only_the_experts_that_a_token_uses_count():
    one, two = (
        ModelFlops.of(model_of("mixtral", num_local_experts=4, num_experts_per_tok=used, num_key_value_heads=2))
        for used in (1, 2)
    )
    assert two.per_token - one.per_token == 6 * 3 * 3 * 32 * 48  # one more expert, three matrices, three layers


def test_attention_counts_allowed_pairs_in_every_layer():
    flops = ModelFlops.of(model_of("llama"))
    layout = PackedLayout((0, 1, 4, 8), anchor_len=1)
    assert flops.attention(layout) == 3 * 12 * 8 * 4 * int(layout.allowed_array().sum())
    saved = flops.attention_saved([layout])
    assert saved == pytest.approx(1 - layout.allowed_array().sum() / 36)


def test_head_dimensions_are_those_of_the_tensors():
    for name, dims in {"llama": (8, 8), "qwen3": (16, 16), "gpt_neox": (8, 8), "deepseek_v3": (12, 8)}.items():
        model = ARCHITECTURES[name].build()
        assert head_dims(model.config) == dims
        if name == "deepseek_v3":  # q.k in 12 dimensions, p.v in 8
            attention = model.model.layers[0].self_attn
            assert attention.q_b_proj.out_features == 4 * 12 and attention.o_proj.in_features == 4 * 8
            assert ModelFlops.of(model).per_pair == 3 * 2 * (12 + 8) * 4


def test_windows_follow_the_layer_types():
    config = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8, sliding_window=5)
    windows = layer_windows(config)
    assert windows == tuple(5 if kind == "sliding_attention" else None for kind in config.layer_types)
    assert layer_windows(AutoConfig.for_model("mistral", **SIZES, sliding_window=7)) == (7, 7, 7)
    assert layer_windows(AutoConfig.for_model("qwen2", **SIZES, use_sliding_window=False)) == (None,) * 3


def test_peaks_of_known_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA L40") == 181e12
    assert peak_flops("a CPU") is None
