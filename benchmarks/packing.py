"""Packing on this CPU: speed, memory, waste and balance, on the same tokens in one run.

  speed      packed tokens per second, without tokenising, of documents of log-normal lengths in memory, against
               trl         `trl.pack_dataset` (strategies bfd_split and wrapped), ids only
               token loop  plain Python, a token at a time, that makes what a row needs: ids, labels, document numbers
               piece loop  plain Python, the same three by `list.extend` and slices, a piece at a time
               list loop   plain Python, `list.extend` and slices, ids only: no labels and no boundaries
             ours makes ids, loss weights, boundaries and the account of every token
  memory     peak resident memory of planning, packing and writing synthetic corpora of growing size, each in a process
             of its own
  policies   padding and truncation on the standard library's sources, for every policy
  balance    what the slowest of 8 processes does over the mean, as rows are drawn at random and as we draw them
  tokenise   the first stage of `anchorctx prepare`, texts to tokens on disk, against `tokenizers` alone

Writes packing.json, packing.md and packing.png. `trl` is no dependency of this package: install it by hand, beside,
with `pip install --no-deps --target FOLDER trl==1.16.0`, and run this with PYTHONPATH=FOLDER; without it its lines are
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from packing_report import draw, report
from tqdm import tqdm

from anchorctx.data.config import PrepareConfig
from anchorctx.data.inspection import expect
from anchorctx.data.order import epoch_order
from anchorctx.data.packed_set import ShardWriter, rows_per_shard
from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.assemble import RowShape, Workspace, assemble
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.mixture import MixtureConfig
from anchorctx.data.packing.packer import Packer
from anchorctx.data.packing.pieces import ArrayText, Rows, Tags, make_pieces
from anchorctx.data.packing.planning import Corpus, DocumentPlan, plan_rows, shards_of
from anchorctx.data.prepare import Making, Preparation, write_rows
from anchorctx.data.sources.documents import OnBadRow, Reading
from anchorctx.data.sources.source import SourceConfig, SourceFormat
from anchorctx.data.sources.stdlib import Split, StdlibConfig, train_tokenizer
from anchorctx.data.tokens.store import DOCUMENT, TokenPart
from anchorctx.pieces import deal
from anchorctx.records.manifest import build_manifest, write_json

MEDIAN, SIGMA = 900, 1.2
"""Log-normal lengths of documents: median in tokens and standard deviation of the logarithm."""
VOCABULARY = 32_000
COPIES = 4
"""Times that the standard library is in the corpus to tokenise."""
WORKSPACE = Workspace()
"""Kept from shard to shard, as `prepare` does."""
GIB = 2**30


def main() -> None:
    """Measure, print the tables, write them beside a JSON file and a picture."""
    arguments = parse_arguments()
    if arguments.probe:
        print(json.dumps(pack_store(arguments.probe, arguments.row_length)))
        return
    settings = {name: getattr(arguments, name) for name in ("tokens", "rounds", "row_length", "corpus_gib")}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        measured = {
            "manifest": build_manifest("benchmarks/packing", settings),
            "speed": [found for length in (4096, 65_536) for found in speed(arguments, length)],
            "memory": [memory(Path(folder), size, arguments.row_length) for size in arguments.corpus_gib],
            "policies": [found for length in (4096, 65_536) for found in policies(Path(folder), length)],
            "balance": [found for rows in (8, 16, 64) for found in balance(rows)],
            "tokenise": tokenising(Path(folder), arguments.rounds),
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "packing.json", measured)
    text = report(measured)
    (arguments.out / "packing.md").write_text(text)
    draw(measured, arguments.out / "packing.png")
    print(text)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of the speed measurement")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each; the fastest counts")
    parser.add_argument("--row-length", type=int, default=65_536, help="row length of the memory measurement")
    parser.add_argument("--corpus-gib", type=float, nargs="*", default=[0.25, 0.5, 1, 2], help="sizes of token corpora")
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace, row_length: int) -> Iterator[dict[str, Any]]:
    """Tokens per second of every way, on the same documents."""
    lengths = lognormal(arguments.tokens, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, lengths.sum(), dtype=np.int32)
    ways = {
        "ours, best_fit": lambda: ours(Policy.best_fit, lengths, tokens, row_length),
        "ours, concat_split": lambda: ours(Policy.concat_split, lengths, tokens, row_length),
        **trl_ways(lengths, tokens, row_length),
    }
    texts = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    ways |= {
        "token loop": lambda: token_loop(texts, row_length),
        "piece loop": lambda: piece_loop(texts, row_length),
        "list loop": lambda: list_loop(texts, row_length),
    }
    for name, run in tqdm(ways.items(), desc=f"rows of {row_length:,}", unit="way"):
        seconds, rows = fastest(run, arguments.rounds)
        found = {"row_length": row_length, "way": name, "seconds": seconds, "tokens": int(lengths.sum())}
        yield found | {"tokens_per_second": lengths.sum() / seconds, "rows": rows}


def lognormal(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of documents that make about so many tokens."""
    count = max(int(tokens / (MEDIAN * np.exp(SIGMA**2 / 2))), 1)
    return np.maximum(rng.lognormal(np.log(MEDIAN), SIGMA, count).astype(np.int64), 1)


def fastest(run: Callable[[], int], rounds: int) -> tuple[float, int]:
    """Least seconds of several rounds, and what the last one returned."""
    seconds, result = [], 0
    for _ in range(rounds):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def ours(policy: Policy, lengths: np.ndarray, tokens: np.ndarray, row_length: int) -> int:
    """Plan and make all rows, shard by shard as `prepare` does; returns how many."""
    shape, accounting = RowShape(row_length, 1, 1, 2), Accounting(["corpus"])
    accounting.add("document_tokens", np.zeros(len(lengths), np.int64), lengths)
    documents = make_pieces(lengths, document=np.arange(len(lengths)), start=np.cumsum(lengths) - lengths)
    packer = Packer(PackConfig(policy=policy), shape.capacity, 0, accounting)
    several = iter([*packer.add(documents), *packer.finish()])
    for shard in shards_of(several, rows_per_shard(row_length)):
        assemble(shard, shape, Tags(), {0: ArrayText(tokens)}, accounting, workspace=WORKSPACE)
    accounting.check(row_length)
    return accounting.rows


def trl_ways(lengths: np.ndarray, tokens: np.ndarray, row_length: int) -> dict[str, Callable[[], int]]:
    """trl's packing of the same documents, an Arrow dataset in memory; nothing where trl is not installed."""
    try:
        from trl import pack_dataset  # type: ignore[import-not-found]
    except ImportError:
        return {}
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    column = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column}))
    return {
        f"trl, {strategy}": lambda strategy=strategy: len(pack_dataset(dataset, row_length, strategy))
        for strategy in ("bfd_split", "wrapped")
    }


def token_loop(texts: list[list[int]], row_length: int) -> int:
    """Documents end to end, a token at a time: ids, labels (not of a document's first token), document numbers."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    ids: list[int] = [1]
    labels, documents = [-100], [-1]
    for number, text in enumerate(texts):
        for token in text:
            ids.append(token)
            labels.append(token if documents[-1] == number else -100)
            documents.append(number)
            if len(ids) == row_length:
                rows.append((ids, labels, documents))
                ids, labels, documents = [1], [-100], [-1]
    return len(rows) + (len(ids) > 1)


def piece_loop(texts: list[list[int]], row_length: int) -> int:
    """The same rows as `token_loop`, a piece at a time."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    ids: list[int] = [1]
    labels, documents = [-100], [-1]
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            piece = text[start : start + row_length - len(ids)]
            start += len(piece)
            ids.extend(piece)
            labels.append(-100)
            labels.extend(piece[1:])
            documents.extend([number] * len(piece))
            if len(ids) == row_length:
                rows.append((ids, labels, documents))
                ids, labels, documents = [1], [-100], [-1]
    return len(rows) + (len(ids) > 1)


def list_loop(texts: list[list[int]], row_length: int) -> int:
    """Documents end to end, a list at a time: ids alone."""
    rows: list[list[int]] = []
    buffer: list[int] = []
    for text in texts:
        buffer.extend(text)
        while len(buffer) >= row_length:
            rows.append(buffer[:row_length])
            buffer = buffer[row_length:]
    return len(rows) + bool(buffer)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: Path, gib: float, row_length: int) -> dict[str, Any]:
    """Peak memory of a process that packs a token store of so many GiB."""
    tokens = int(gib * GIB / 4)
    store = folder / f"store_{gib}"
    write_store(store, tokens)
    command = [sys.executable, __file__, "--probe", str(store), "--row-length", str(row_length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (store / "tokens.bin").unlink()
    return {"corpus_gib": gib, "tokens": tokens} | json.loads(done.stdout.splitlines()[-1])


def write_store(folder: Path, tokens: int) -> None:
    """A token store as `prepare` leaves one: random ids of a vocabulary above 65,536, four bytes each."""
    rng, lengths = np.random.default_rng(0), lognormal(tokens, np.random.default_rng(0))
    documents = np.zeros(len(lengths), DOCUMENT)
    documents["length"], documents["start"] = lengths, np.cumsum(lengths) - lengths
    folder.mkdir()
    np.save(folder / "documents.npy", documents)
    total = int(lengths.sum())
    with (folder / "tokens.bin").open("wb") as file:
        for start in range(0, total, 2**24):
            file.write(rng.integers(0, 128_000, min(2**24, total - start), dtype=np.uint32).tobytes())
    facts = {"documents": len(lengths), "tokens": total, "dtype": "uint32", "weights": False, "domains": [""]}
    facts |= {"read": len(lengths), "written": 0, "skipped": {}, "is_last": True, "is_clean": True, "bytes": {}}
    write_json(folder / "part.json", facts)


def pack_store(store: Path, row_length: int) -> dict[str, Any]:
    """Plan, pack and write the store; its packed set is removed again."""
    before, began = peak_bytes(), time.perf_counter()
    corpus = Corpus([TokenPart.open(store)], [0], ["synthetic"])
    plan, tags, rows = DocumentPlan(corpus, MixtureConfig()), Tags(), rows_per_shard(row_length)
    shape, accounting = RowShape(row_length, 1, 1, 2), plan.accounting()
    planned = plan_rows(plan, PackConfig(), shape.capacity, tags, [np.zeros(1, np.int64)], accounting)
    with ShardWriter(store / "packed", row_length, 128_000, 1) as writer:
        making = Making(writer.folder, shape, tags, corpus.parts, rows, tuple(plan.names))
        for item in enumerate(shards_of(planned, rows)):
            files, counted = write_rows(making, item)
            writer.put(files)
            accounting.merge_rows(counted)
    accounting.check(row_length)
    seconds = time.perf_counter() - began
    return {"peak_gib": peak_bytes() / GIB, "imports_gib": before / GIB, "seconds": seconds, "rows": accounting.rows}


def peak_bytes() -> int:
    """Most resident memory that this process had; unlike `getrusage` it does not begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# -- policies, balance, tokenising ------------------------------------------------------------------------------------


def stdlib_preparation(folder: Path, row_length: int) -> Preparation:
    """A preparation of the embedded corpus with a small byte-level BPE."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer().save_pretrained(tokenizer)
    source = SourceConfig(format=SourceFormat.stdlib, stdlib=StdlibConfig(split=Split.all))
    return Preparation(
        PrepareConfig(out_dir=str(folder), sources=[source], tokenizer=str(tokenizer), row_length=row_length)
    )


def policies(folder: Path, row_length: int) -> Iterator[dict[str, Any]]:
    """Rows, padding and loss of every policy on the standard library's sources."""
    from anchorctx.data.engine import LocalEngine

    preparation = stdlib_preparation(folder, row_length)
    corpus = preparation.corpus(LocalEngine())
    plan = DocumentPlan(corpus, MixtureConfig())
    tags, domain_tags = preparation.tags(corpus)
    came = sum(plan.accounting().total(name) for name in ("document_tokens", "eos_tokens"))
    for policy in Policy:
        for long in LongDocuments:
            found = expect(plan, PackConfig(policy=policy, long_documents=long), preparation, tags, domain_tags)
            yield {
                "row_length": row_length,
                "policy": policy.value,
                "long_documents": long.value,
                "rows": found.rows,
                "padding": found.padding / max(found.rows * row_length, 1),
                "dropped": sum(found.dropped.values()) / came,
                "cut_documents": found.cut_documents,
                "documents": len(corpus.parts[0].documents),
                "attention_of_full": found.cost / max(found.rows * row_length**2, 1),
            }


def balance(rows_per_step: int) -> Iterator[dict[str, Any]]:
    """The slowest of 8 processes over the mean, for best-fit rows of log-normal documents."""
    for row_length in (4096, 65_536):
        lengths = lognormal(3000 * row_length, np.random.default_rng(0))
        packer = Packer(PackConfig(), row_length - 1, 0, Accounting(["corpus"]))
        documents = make_pieces(lengths, document=np.arange(len(lengths)), start=np.cumsum(lengths) - lengths)
        rows = Rows.joined([*packer.add(documents), *packer.finish()])
        sizes = rows.pieces["size"].astype(np.float64)
        costs = np.add.reduceat(sizes**2, rows.ends - rows.counts)
        found: dict[str, Any] = {"rows_per_step": rows_per_step, "row_length": row_length}
        for name, is_balanced in (("shuffled", False), ("balanced", True)):
            order = epoch_order(costs, 0, 0, 0, is_balanced)
            steps = costs[order[: len(order) // rows_per_step * rows_per_step]].reshape(-1, rows_per_step)
            each = np.stack([_eight(step) if is_balanced else step.reshape(-1, 8).sum(0) for step in steps])
            found[name] = float(each.max(1).sum() / each.mean(1).sum())
        yield found


def _eight(costs: np.ndarray) -> list[float]:
    """What each of 8 processes has of a step's rows, dealt out whole."""
    rows = np.ones(len(costs), int)
    return [sum(float(costs[piece].sum()) for piece in own) for own in deal(rows, costs, len(costs) // 8, 8)]


def tokenising(folder: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of the first stage on a .jsonl file, and of `tokenizers` alone on its texts in one call."""
    from tokenizers import Tokenizer

    preparation = stdlib_preparation(folder, 4096)
    texts = [document.text for document in preparation.sources[0].texts(Reading())] * COPIES
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alone = Tokenizer.from_str(preparation.ingest.encoder.rules or "")
    seconds: dict[str, list[float]] = {"alone": [], "ours": []}
    tokens = 0
    for number in tqdm(range(rounds), desc="tokenise", unit="round"):
        began = time.perf_counter()
        encoded = alone.encode_batch_fast(texts, add_special_tokens=False)
        seconds["alone"].append(time.perf_counter() - began)
        tokens = sum(len(encoding) for encoding in encoded)
        del encoded
        config = preparation.config
        config = replace(config, out_dir=str(folder / str(number)), sources=[SourceConfig(path=str(corpus))])
        ours = Preparation(config)
        began = time.perf_counter()
        ours.ingest.run(ours.sources[0].parts[0], OnBadRow.fail)
        seconds["ours"].append(time.perf_counter() - began)
    rates = {name: tokens / min(values) for name, values in seconds.items()}
    ratios = sorted(a / b for a, b in zip(seconds["alone"], seconds["ours"], strict=True))
    found = {"tokens": tokens, "megabytes": corpus.stat().st_size / 1e6, "cores": len(os.sched_getaffinity(0))}
    return found | {"tokens_per_second": rates, "ratio": rates["ours"] / rates["alone"], "ratios": ratios}


if __name__ == "__main__":
    main()
