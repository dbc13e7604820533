"""The same packed rows with keys that are unique in a row: no two documents of a row state a value for the same key.

    python recipes/miniature/unique_keys.py PACKED OUT

Under full attention an earlier document may state another value for a key that a later one asks for. That is a real
effect of packing unrelated documents, but not the one that the paper means; these rows separate the two. Only the keys'
token ids change: text, values, places, loss weights and the order of rows stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np

from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.sources.facts import NUM_KEYS, FactTokens
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.manifest import fingerprint


def relabelled(ids: np.ndarray, layout: PackedLayout, tokens: FactTokens, rng: np.random.Generator) -> np.ndarray:
    """`ids` (T,) with each document's keys replaced by keys that no other document of the row has.

    Each document's keys are mapped one to one onto the next of a random order of all 64, so that what it states it
    still asks for. UserError when a row has more keys than there are.
    """
    out, free, used = ids.copy(), tokens.keys[rng.permutation(NUM_KEYS)], 0
    for start, stop in zip(layout.doc_offsets, layout.doc_offsets[1:], strict=False):
        document = ids[start:stop]
        for key in dict.fromkeys(document[np.isin(document, tokens.keys)].tolist()):
            if used == NUM_KEYS:
                raise UserError(f"a row has more than {NUM_KEYS} different facts: prepare it with more chars_per_fact")
            out[start:stop][document == key] = free[used]
            used += 1
    return out


def rewrite(packed: PackedSet, out: Path) -> Path:
    """Write the set with unique keys into a folder of its own in `out`."""
    tokenizer = packed.tokenizer()
    tokens, manifest = FactTokens.of(tokenizer), packed.manifest
    name = fingerprint({"unique_keys_of": packed.fingerprint})
    if (out / name).exists():
        return out / name
    kept = {key: value for key, value in manifest.items() if key not in ("files", "rows", "rows_per_shard")}
    with ShardWriter(out / name, packed.row_length, manifest["vocab_size"], manifest["anchor_len"]) as writer:
        shutil.copytree(packed.folder / "tokenizer", writer.folder / "tokenizer")
        for index in range(len(packed)):
            row = packed.row(index)
            rng = np.random.default_rng([0, index])
            changed = relabelled(np.asarray(row.input_ids), row.layout, tokens, rng)
            writer.add(dataclasses.replace(row, input_ids=changed), int(packed.row_documents[index]))
        return writer.close(kept | {"fingerprint": name, "unique_keys_of": packed.fingerprint})


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("packed", type=Path, help="folder of the packed set")
    parser.add_argument("out", type=Path, help="folder for the set with unique keys")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {rewrite(PackedSet.open(options.packed), options.out)}")
    except UserError as error:
        print(f"unique keys failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
