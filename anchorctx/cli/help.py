"""What every command with a configuration shares: `--help`, `--show`, and the resolved dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from anchorctx.cli.main import COMMANDS, Arguments
from anchorctx.config import compose_config, conf_dir, resolve, schema
from anchorctx.settings import default_of, shown

EXAMPLES = {
    "prepare": """\
anchorctx prepare out_dir=packed tokenizer=MODEL row_length=65536 'sources=[{path: corpus.jsonl.zst}]'
anchorctx prepare --dry-run ...     what there is, and what each policy would make of it""",
    "plan": """\
anchorctx plan --recipe llama3_8b_128k gpu=H100 gpus=8
anchorctx plan model.path=meta-llama/Meta-Llama-3-8B model.dtype=bfloat16 row_length=524288 gpus=8 search=true""",
    "train": """\
torchrun --nproc_per_node 8 -m anchorctx train --recipe llama3_8b_128k \\
    out_dir=runs/mine data.train=packed logging=wandb""",
    "export": "anchorctx export run=runs/mine out_dir=exported dtype=bfloat16",
    "eval": """\
anchorctx eval model=exported out_dir=results 'evals=[perplexity,needle]'
anchorctx eval 'model=[base,exported]' out_dir=results 'evals=[ruler]' 'ruler.lengths=[8192,32768]' ruler.limit=50
torchrun --nproc_per_node 8 -m anchorctx eval model=exported out_dir=results \\
    'evals=[lm_eval]' 'lm_eval.tasks=[mmlu,hellaswag]' lm_eval.batch_size=8""",
    "precision": "anchorctx precision model=exported out_dir=precision 'lengths=[1024, 4096, 16384]'",
    "kvcomm": """\
anchorctx kvcomm model=exported out_dir=reuse
anchorctx kvcomm model=exported out_dir=gate 'tasks=[retrieval]' 'arms=[rotate_glue]' gate.arm=rotate_glue""",
    "plot": (
        "anchorctx plot out_dir=plots run=runs/mine packed=packed 'results=[before/results.jsonl, after/results.jsonl]'"
    ),
    "report": "anchorctx report runs/mine results/after out=report.html",
}


def configuration(command: str, arguments: Arguments) -> Any | None:
    """The command's configuration, or None after printing what `--help` or `--show` asked for."""
    if arguments.help:
        print(help_text(command))
        return None
    if arguments.show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(compose_config(command, arguments.overrides, arguments.recipe)), end="")
        return None
    return resolve(command, arguments.overrides, arguments.recipe)


def help_text(command: str) -> str:
    """Every key with its default and its meaning, the groups of `conf/`, and an example."""
    example = textwrap.indent(EXAMPLES[command], "  ")
    lines = [f"anchorctx {command}: {COMMANDS[command]}", "", "example:", example, "", "keys:"]
    for key, default, meaning in _keys(schema(command)):
        lines.append(f"  {key}={default}")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += _groups(command)
    return "\n".join(lines)


def _keys(owner: type, prefix: str = "", defaults: Any = None) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning). `defaults`: an instance, where the owner is a part whose defaults another one sets."""
    docs, hints = field_docs(owner), get_type_hints(owner)
    for field in dataclasses.fields(owner):
        kind = hints[field.name]
        default = default_of(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(kind):
            # live.perplexity.documents is 16 in LiveConfig, though PerplexityConfig alone has 200
            yield from _keys(kind, f"{prefix}{field.name}.", default)  # type: ignore[arg-type]
            continue
        yield prefix + field.name, "???" if default is dataclasses.MISSING else shown(default), docs.get(field.name, "")
        # sources: list[SourceConfig] has the keys sources[].path, sources[].format, ...
        for element in get_args(kind) if get_origin(kind) is list else ():
            if dataclasses.is_dataclass(element):
                yield from _keys(element, f"{prefix}{field.name}[].")  # type: ignore[arg-type]


def field_docs(owner: type) -> dict[str, str]:
    """The docstring line under each field of a dataclass and of those it derives from, from their sources."""
    docs: dict[str, str] = {}
    for part in reversed(owner.__mro__):  # bases first: a field's text in a derived class replaces theirs
        if dataclasses.is_dataclass(part):
            docs |= _own_field_docs(part)
    return docs


def _own_field_docs(owner: type) -> dict[str, str]:
    # Python keeps no string that stands below a field. pydantic would read it as well, when the class is made, but its
    # import alone takes as long as the whole help
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, doc in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


def _groups(command: str) -> list[str]:
    """Ready-made choices for parts of the configuration."""
    fields = {field.name for field in dataclasses.fields(schema(command))}
    groups = {path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in conf_dir().iterdir() if path.is_dir()}
    found = [f"  {name}={'|'.join(choices)}" for name, choices in sorted(groups.items()) if name in fields]
    return ["", "ready-made choices:", *found] if found else []
