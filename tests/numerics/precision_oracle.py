"""The precision study's main figures again, in plain transformers and torch: nothing of `anchorctx` is imported.

    python tests/numerics/precision_oracle.py MODEL CORPUS.jsonl LENGTH [SHIFT]

For Llama's attention. In each layer the queries and keys of the row's hidden states are rotated twice, at positions 0,
1, 2, ... and at those plus the shift, by the model's own code in bfloat16; what the two softmaxes do not have in common
has moved.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

QUERIES = 64


@torch.no_grad()
def figures(model: PreTrainedModel, ids: torch.Tensor, layers: list[int], shift: int) -> dict[str, float]:
    """Of one row: (T,) token ids. Means over 64 queries of the row's second half, all heads and `layers`."""
    length, config = len(ids), model.config
    positions = torch.arange(length)
    queries = torch.linspace(length // 2, length - 2, min(QUERIES, length - 1 - length // 2)).long()
    unseen = positions[None] > positions[:, None]  # (T, T)
    moved, hidden, attention, by_key = [], [], [], torch.zeros(length, dtype=torch.float64)
    states = model.model.embed_tokens(ids[None])
    for index, block in enumerate(model.model.layers):
        x = block.input_layernorm(states)
        parts = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        q, k, v = (part(x).view(1, length, -1, config.head_dim).transpose(1, 2) for part in parts)
        logits = []  # (H, T, T), without the shift and with it
        for at in (positions, positions + shift):
            rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, at[None]))
            rotated_k = rotated_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = rotated_q[0].float() @ rotated_k[0].float().mT * config.head_dim**-0.5
            logits.append(scores.masked_fill(unseen, float("-inf")))
        if index in layers:
            some = [x[:, queries].double() for x in logits]
            before, after = (x.softmax(-1) for x in some)
            change = (after - before).abs()
            moved.append(change.sum(-1).mean().item() / 2)
            without = [x[..., 1:].softmax(-1) for x in some]
            hidden.append((without[1] - without[0]).abs().sum(-1).mean().item() / 2)
            attention.append(before[..., 0].mean().item())
            by_key += change.mean((0, 1))
        # The next layer's states, of the row without a shift; attention is rounded to bfloat16 once, at its end.
        values = v[0].float().repeat_interleave(q.shape[1] // v.shape[1], 0)
        out = (logits[0].softmax(-1) @ values).to(x.dtype).transpose(0, 1).reshape(1, length, -1)
        states = states + block.self_attn.o_proj(out)
        states = states + block.mlp(block.post_attention_layernorm(states))
    share = by_key / by_key.sum()
    return {
        "attention_change": statistics.fmean(moved),
        "hidden_change": statistics.fmean(hidden),
        "first_attention": statistics.fmean(attention),
        "first_share": share[0].item(),
        "other_share": share[1:].max().item(),
        "first_rank": 1 + int((share[1:] > share[0]).sum()),
    }


def rows_of(tokens: list[int], bos: int, length: int, count: int) -> list[torch.Tensor]:
    """`count` rows of `length` tokens, BOS and then text, from places spread evenly over the tokens."""
    text, spare = length - 1, len(tokens) - (length - 1) * count
    starts = [i * text + spare * i // max(count - 1, 1) for i in range(count)]
    return [torch.tensor([bos, *tokens[start : start + text]]) for start in starts]


def main(folder: str, file: str, length: int, shift: int = 16, count: int = 4) -> None:
    """Print the means over four rows of the file's texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    texts = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
    tokens = [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]
    layers = sorted({i * model.config.num_hidden_layers // 8 for i in range(8)})
    found = [figures(model, row, layers, shift) for row in rows_of(tokens, tokenizer.bos_token_id, length, count)]
    for name in found[0]:
        print(f"{name:18} {statistics.fmean(row[name] for row in found):.6g}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
