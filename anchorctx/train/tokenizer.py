"""Do rows and model belong together? The tokenizer that made a packed set's ids, and the checkpoint's own."""

from __future__ import annotations

import json
import logging

from transformers import PreTrainedTokenizerBase

from anchorctx.data.packed_set import PackedSet
from anchorctx.data.tokens.tokenizer import serialized, tokenizer_fingerprint
from anchorctx.errors import UserError
from anchorctx.models.load import read_tokenizer
from anchorctx.train.config import TokenizerOf, TrainConfig

logger = logging.getLogger(__name__)

CUTTING = ("normalizer", "pre_tokenizer", "model")
"""Parts of a fast tokenizer that decide, with its vocabulary, which ids a text gets."""


def trained_tokenizer(config: TrainConfig, packed: PackedSet) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that is trained: its own, or else the one of the rows.

    The rows' is taken for a new model, a checkpoint without a tokenizer, and where `data.tokenizer=other` says so.

    Raises:
        UserError: the two give a text different ids; names the first difference.
    """
    path = config.model.path
    if path is None or config.data.tokenizer is TokenizerOf.other:
        return packed.tokenizer()
    try:
        own = read_tokenizer(path)
    except UserError as error:
        logger.warning("%s; its rows' tokenizer is taken for it, and nobody could compare them", error)
        return packed.tokenizer()
    # the same object as a rule, and then nothing more is read
    if tokenizer_fingerprint(own) != packed.manifest.get("tokenizer_fingerprint"):
        found = difference(packed.tokenizer(), own)
        if found is not None:
            raise UserError(
                f"data.train was made by another tokenizer than that of model.path={path} ({found}): prepare it with "
                "tokenizer set to that model, or say data.tokenizer=other if the model is to learn new ids"
            )
    return own


def difference(rows: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> str | None:
    """Where ids made by `rows` mean something else to `own`, in words; None where they do not.

    Special roles, templates and tokens that only `own` has do not matter: no id of a row depends on them.
    """
    meant = {i: token for token, i in own.get_vocab().items()}
    for token, i in sorted(rows.get_vocab().items(), key=lambda item: item[1]):
        if meant.get(i) != token:
            instead = f"{meant[i]!r}" if i in meant else "nothing"
            return f"id {i} is {token!r} in the rows and {instead} to the model"
    theirs, ours = serialized(rows), serialized(own)
    if theirs is None or ours is None:
        return None
    first, second = json.loads(theirs), json.loads(ours)
    for part in CUTTING:
        if first[part] != second[part]:
            return f"both have the same tokens, but they cut texts differently: by their {part.replace('_', '-')}"
    return None
