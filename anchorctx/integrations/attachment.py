"""AnchorAttention for a model whose trainer, collator and loss stay as they are: `attach(model)`.

The trainer packs, or pads, as it always does. What changes is the decoder, between ids and hidden states: it finds the
documents in what the trainer hands over (`integrations.documents`), puts a copy of the anchor in front of each, runs
over that row at the positions of AnchorAttention, and hands back the hidden states of the trainer's own tokens, in
their places. Nothing outside of it meets a copy: logits line up with the trainer's labels, its `num_items_in_batch`,
token accuracy and tiled losses count what they always count, and so do router losses of mixtures of experts.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.keywords import hand_on_keywords
from anchorctx.attention.rope import restore_frequencies, set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.integrations.check import check_model, warn_of_data_parallel
from anchorctx.integrations.collator import choice
from anchorctx.integrations.decoder import (
    ATTACHED,
    MARK,
    Attachment,
    attached_forward,
    boundaries_of,
    register_attached,
)
from anchorctx.integrations.reader import IGNORED
from anchorctx.layout import Pattern

logger = logging.getLogger(__name__)


def attach(
    model: Any,
    pattern: Pattern | str | None = Pattern.anchor,
    rope_dtype: RopeDtype | str = RopeDtype.float32,
    *,
    anchor: int | None = None,
    row_length: int | None = None,
) -> None:
    """Let `model` train with AnchorAttention under any trainer, whose batches say where documents lie.

    Checks the model, sets its attention and the dtype of its rotation, and has its decoder lay batches out. `detach`
    undoes it. Attach before or after PEFT, DistributedDataParallel, `fully_shard` or a trainer wrap the model.

    Batches are (B, T) `input_ids`, with `cu_seq_lens_q` of one flattened row, `position_ids` that restart at 0, or an
    `attention_mask` of integers or of 0 and 1, padded on the right (`integrations.documents`); or with `layouts`, which
    are taken as they are. A document that begins with the anchor's token has its copy already. `labels` stay the
    trainer's: those of documents' first tokens must be -100, as TRL's and transformers' collators have them.
    With a KV cache (`generate`) the model computes plain causal attention over the prompt: begin it with the anchor.

    Args:
        model: a transformers causal language model with RoPE, also wrapped.
        pattern: `anchor`, `anchor_reset`, `intra_doc` or `intra_doc_reset`. None for batches that are laid out
            already, as those of `AnchorCollator` and `RowDataset`.
        rope_dtype: in which dtype queries and keys are rotated.
        anchor: token id of the anchor; None is the BOS of the model's configuration, else its EOS.
        row_length: positions run from 0, the anchor's, to row_length - 1; a document that no longer fits begins at 1
            again. None is the model's max_position_embeddings.

    Raises:
        UserError: a model that cannot be trained so, or is attached already.
    """
    owner = _transformers_model(model)
    decoder = _decoder_of(owner)
    if hasattr(decoder, MARK):
        raise UserError(f"{type(owner).__name__} is attached already: call detach(model) first to attach it anew")
    kind = None if pattern is None else choice(Pattern, "pattern", pattern)
    if kind is Pattern.full:
        raise UserError("pattern=full lets documents see each other, as the trainer does by itself: do not attach")
    dtype, config = choice(RopeDtype, "rope_dtype", rope_dtype), owner.config.get_text_config()
    token = _anchor_of(config, anchor)
    reach = getattr(config, "max_position_embeddings", None) or 2**31 if row_length is None else row_length
    if not isinstance(reach, int) or reach < 2:
        raise UserError(f"row_length={reach!r} must be an integer of 2 or more: the anchor, and a token behind it")
    _check_dropout(decoder)
    register_attached()
    before = config._attn_implementation or "eager"
    owner.set_attn_implementation(ATTACHED)
    try:
        hand_on_keywords(owner)
        check_model(model)
        set_rope_dtype(owner, dtype)
        restore_frequencies(owner)  # model.to(bfloat16) would have rounded them
    except UserError:
        owner.set_attn_implementation(before)
        raise
    warn_of_data_parallel()
    forward = decoder.__dict__.get("forward")
    hook = model.register_forward_pre_hook(_LabelCheck(done=kind is None), with_kwargs=True)
    setattr(decoder, MARK, Attachment(token, _ends(config), kind, int(reach), before, forward, hook, config))
    decoder.forward = partial(attached_forward, decoder)
    logger.info("attached to %s: pattern=%s, anchor %d, rows of %d positions", type(owner).__name__, kind, token, reach)


def detach(model: Any) -> None:
    """Undo `attach`: the model's forward, attention and rotation are transformers' own again.

    Raises:
        UserError: the model is not attached.
    """
    owner = _transformers_model(model)
    decoder = _decoder_of(owner)
    attachment: Attachment | None = getattr(decoder, MARK, None)
    if attachment is None:
        raise UserError(f"{type(owner).__name__} is not attached: there is nothing to detach")
    attachment.hook.remove()
    delattr(decoder, MARK)
    del decoder.forward
    if attachment.forward is not None:
        decoder.forward = attachment.forward
    set_rope_dtype(owner, RopeDtype.bfloat16)
    owner.set_attn_implementation(attachment.attention)


def _transformers_model(model: Any) -> Any:
    """The model inside DistributedDataParallel and PEFT."""
    inner = getattr(model, "module", model)
    if hasattr(inner, "_orig_mod"):
        name = type(inner._orig_mod).__name__
        raise UserError(f"{name} is compiled: attach (or detach) the model itself, then call torch.compile")
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel):
        raise UserError(f"model={model!r:.60} is no transformers model: pass one of AutoModelForCausalLM")
    return inner


def _decoder_of(owner: Any) -> Any:
    """From ids to the last hidden states: what the model's head calls, around a text model that may get embeddings.

    Not `get_decoder()`: that is the whole model for Llama 4, the head for ModernBERT's decoder, and for models with
    images the text model, which gets no ids.
    """
    base = owner.base_model
    return base if base is not owner else getattr(owner, "model", owner)


def _anchor_of(config: Any, anchor: int | None) -> int:
    for token in (anchor, config.bos_token_id, *_ends(config)[:1]):
        if token is not None:
            if not isinstance(token, int):
                raise UserError(f"anchor={token!r} must be a token's id: tokenizer.convert_tokens_to_ids finds it")
            if not 0 <= token < config.vocab_size:
                raise UserError(f"anchor={token} is beyond the model's vocabulary of {config.vocab_size}: name another")
            return int(token)
    raise UserError("the model's configuration has neither a BOS nor an EOS token to be the anchor: give anchor=")


def _ends(config: Any) -> tuple[int, ...]:
    """The EOS tokens."""
    found = config.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)


def _check_dropout(decoder: Any) -> None:
    for module in decoder.modules():
        found = getattr(module, "attention_dropout", None)
        if isinstance(found, float) and found > 0:
            raise UserError(
                f"{type(module).__name__} has attention_dropout={found}, which no backend computes: load the model "
                "with attention_dropout=0.0"
            )


class _LabelCheck:
    """A pre-hook of the whole model: labels must be one a token, and the first batch's must not cross documents."""

    def __init__(self, done: bool) -> None:
        self._done = done

    @torch.compiler.disable
    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
        if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor):
            return
        if labels.shape != ids.shape:
            raise UserError(
                f"labels of shape {tuple(labels.shape)} for input_ids of {tuple(ids.shape)}: give one label a token, "
                f"unshifted, {IGNORED} where it is not trained"
            )
        if self._done or kwargs.get("layouts") is not None or ids.ndim != 2 or not ids.numel():
            return  # the decoder refuses the last two
        self._done = True
        owner = _transformers_model(model)
        spans = boundaries_of(kwargs).spans(type(owner).__name__, *ids.shape)
        starts = spans[spans[:, 0] % ids.shape[1] > 0, 0]  # nothing predicts the first token of a row
        crossing = int((labels.reshape(-1)[torch.from_numpy(starts).to(labels.device)] != IGNORED).sum())
        if crossing:
            logger.warning(
                "labels train the first tokens of %d of the %d documents in the first batch, which the last token of "
                "another document would predict: set them to %d in the collator",
                crossing,
                len(spans),
                IGNORED,
            )
