"""GGUF files become folders with the same numbers and the same ids; whatever cannot is refused with its reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.cli.main import main
from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, build_config, load_model
from anchorctx.models.gguf import folder_of
from anchorctx.models.gguf_tokenizer import TEXTS
from anchorctx.models.load import load_weights, read_config, read_tokenizer
from anchorctx.testing.tiny import text_model

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
CODE = "def f(x):\n" + "".join(f"    y{i} = {i * 37}\n    return  {i}\n" for i in range(60))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Edit = Callable[[Any], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Each digit apart, the rest as in GPT-2: what llama.cpp calls smollm."""
    bpe = Tokenizer(tokenizer_models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([CODE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return text_model(tokenizer, 256)


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp rotates them: pairs (2i, 2i + 1) instead of (i, i + dim / 2)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    kind: str = "Q8_0",
    *,
    arch: str = "llama",
    pre: str = "smollm",
    edit: Edit = lambda writer: None,
) -> Path:
    """The model and its tokenizer as a GGUF file; `edit` gets the writer last."""
    writer, config = gguf.GGUFWriter(path, arch), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(12_345.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in ("<s>", "</s>") else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in rules["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        values, quantised = weight.float().numpy(), gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        writer.add_tensor(gguf_name(name), gguf.quantize(values, quantised), raw_dtype=quantised)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_weights_are_the_dequantised_ones(
    kind: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "tiny.gguf", model, tokenizer, kind))
    config = read_config(path)
    assert config.rope_parameters["rope_theta"] == 12_345.0 and config.max_position_embeddings == 256
    loaded, quantised = load_weights(path, config, dtype=torch.float32), gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        expected = weight.numpy()
        if weight.dim() == 2:  # a row is quantised in blocks of its own, so that the order of rows does not matter
            expected = gguf.dequantize(gguf.quantize(expected, quantised), quantised)
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), expected, err_msg=name)
    # An ordinary model, which trains and is saved by plain transformers.
    assert loaded.dtype is torch.float32 and getattr(loaded, "hf_quantizer", None) is None
    loaded.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_the_tokenizer_is_the_models_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = read_tokenizer(str(write(tmp_path / "tiny.gguf", model, tokenizer)))
    for text in (*TEXTS, CODE, "a  12", "<s>x</s>"):
        assert read.encode(text) == tokenizer.encode(text)
        assert read.decode(read.encode(text)) == text
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi</s>"
    assert not caplog.records
    # GPT-2's rule leaves one of the blanks with the digit: other ids for the same text.
    other = read_tokenizer(str(write(tmp_path / "other.gguf", model, tokenizer, pre="new-rule")))
    assert "splits text by a rule that is not known here (new-rule)" in caplog.text
    assert other.encode("a  12") != tokenizer.encode("a  12") and other.decode(other.encode("a  12")) == "a  12"


def test_scaled_frequencies_are_taken_over(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Llama 3's come as divisors of the frequencies; transformers alone would read the model without them."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    dim, base = model.config.head_dim, 12_345.0
    scaled = LlamaConfig(head_dim=dim, rope_parameters=LLAMA3 | {"rope_theta": base})
    divisors = (base ** -(torch.arange(0, dim, 2) / dim) / LlamaRotaryEmbedding(scaled).inv_freq).numpy()
    assert divisors.max() == pytest.approx(8) and divisors.min() == pytest.approx(1)

    def llama3(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", divisors)

    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = str(write(tmp_path / "llama3.gguf", model, tokenizer, edit=llama3))
    assert read_config(path).rope_parameters == LLAMA3 | {"rope_theta": base}
    load_weights(path, read_config(path))
    path = str(write(tmp_path / "linear.gguf", model, tokenizer, edit=linear))
    assert read_config(path).rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": base}


def test_a_file_is_converted_once_and_its_weights_only_for_who_needs_them(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "tiny.gguf", model, tokenizer)
    build_config(ModelConfig(path=str(tmp_path), gguf_file="tiny.gguf"))
    read_tokenizer(str(path))
    assert not list(cache.rglob("*.safetensors"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            load_model(ModelConfig(path=str(path)))
    assert len([message for message in caplog.messages if "dequantising" in message]) == 1
    assert folder_of(str(path)) != folder_of(str(write(tmp_path / "tiny.gguf", model, tokenizer, "Q4_1")))
    assert not [p for p in cache.rglob("*") if ".partial" in p.name or p.name.endswith(".lock")]


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_cannot_be_read_is_refused_with_its_reason(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cache: Path
) -> None:
    whole = write(tmp_path / "whole.gguf", model, tokenizer).read_bytes()
    q8 = gguf.GGMLQuantizationType.Q8_0

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    def divisors(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(model.config.head_dim // 2, 2.0, np.float32))

    def bias(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))

    def q8_k(writer: Any) -> None:
        writer.add_tensor("blk.0.more.weight", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)

    def same_tokens(writer: Any) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[tokens.index("ÿ")] = "þ"  # two bytes that no merge has

    def no_merges(writer: Any) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.merges")

    def refused(path: Path, pattern: str) -> None:
        with pytest.raises(UserError, match=pattern) as error:
            load_weights(str(path), read_config(str(path)))
        assert "\n" not in str(error.value)

    for size in (20, 200, 20_000, len(whole) - 100):
        refused(damaged(tmp_path / "cut.gguf", whole[:size]), r"model .*cut.gguf is cut short or damaged")
    refused(damaged(tmp_path / "zip.gguf", b"PK\3\4" + whole[4:]), "is not a GGUF file, which begins with")
    refused(tmp_path / "none.gguf", "does not exist: name a GGUF file of this machine, or one of the hub")
    make = lambda name, **options: write(tmp_path / f"{name}.gguf", model, tokenizer, **options)  # noqa: E731
    refused(make("arch", arch="rwkv6"), r"cannot be read by transformers \(.*rwkv6 is not supported")
    refused(make("yarn", edit=yarn), r"scales its rotary frequencies \(yarn\) in a way that transformers does not read")
    refused(make("divisors", edit=divisors), "scales its rotary frequencies in another way than Llama 3")
    refused(make("bias", edit=bias), "of which transformers' LlamaForCausalLM takes .*: it would compute something")
    refused(make("type", edit=q8_k), "weights of the type Q8_K, which the package gguf cannot dequantise")
    refused(make("merges", edit=no_merges), r"cannot be read by transformers \(.*\): take the model as a Hugging Face")
    refused(make("tokens", edit=same_tokens), r"the tokenizer of .*tokens.gguf is not what the file says")
    unknown = whole.replace(np.uint32(q8).tobytes() + bytes(8), np.uint32(99).tobytes() + bytes(8), 1)
    refused(damaged(tmp_path / "new.gguf", unknown), "has a quantisation that the package gguf cannot read")
    assert not list(cache.rglob("*.safetensors"))


def test_without_the_package(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", model, tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'anchorctx\[gguf\]'"):
        read_config(str(path))


def test_every_command_takes_a_file(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, corpus = write(tmp_path / "tiny.gguf", model, tokenizer), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": CODE[i:] * 3}) + "\n" for i in range(8)))
    text = f"corpus={{path: {corpus}, format: auto}}"
    source = f"sources=[{{path: {corpus}, format: auto}}]"
    packed = [f"tokenizer={path}", f"out_dir={tmp_path / 'packed'}", source, "row_length=64", "workers=1"]
    assert main(["prepare", *packed]) == 0
    assert main(["plan", f"model.path={tmp_path}", "model.gguf_file=tiny.gguf", "row_length=64"]) == 0
    assert main(["eval", f"model={path}", f"out_dir={tmp_path / 'eval'}", text, "perplexity.max_length=64"]) == 0
    assert "tiny.gguf" in capsys.readouterr().out
