"""The direction of imports, the limits of size and the checkers' verdict, as tests.

Imports are read with `ast`, those inside functions too, so that no arrow hides from the rule.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anchorctx.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anchorctx"
FOLDERS = ("benchmarks", "docs", "examples", "recipes", "scripts", "tests")
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = SOURCES + [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]

FOUNDATION = {"errors", "interrupt", "lazy", "settings", "records", "pieces", "layout", "flops"}
PARTS = {"train", "evals", "data", "models", "parallel", "plan", "report"}
MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"config", "attention"} | PARTS,
    "config": PARTS,
    "train": {"data", "parallel", "models"},
    "evals": {"data", "parallel", "models", "kvcomm", "attention"},
    "plan": {"data", "parallel", "models", "attention"},
    "parallel": {"models", "attention"},
    "kvcomm": {"models", "attention.rope"},
    "models": {"attention"},
    "integrations": {"attention", "data.packed_set"},
    "attention": set(),
    "data": set(),
    "report": set(),
    "testing": PARTS | {"attention", "kvcomm", "config"},
} | {name: set() for name in FOUNDATION}
"""Besides itself and the foundation. Names are modules or packages under `anchorctx`."""
ONLY_IN = {
    "hydra": ("cli", "config"),
    "omegaconf": ("cli", "config"),
    "flash_attn": ("attention.kernels.flash_attn",),
    "triton": ("attention.fused",),
    "lm_eval": ("evals.evaluators.lm_eval",),
    "wandb": ("records.wandb_run", "report.wandb_report"),
    "deepspeed": ("train", "parallel"),
}
"""Third-party packages that belong to a few modules."""
NEVER_IN = {"torch": ("report",)}
LAZY = ("deepspeed", "wandb", "flash_attn", "matplotlib", "lm_eval", "transformers", "torch", "triton")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


# -- imports ----------------------------------------------------------------------------------------------------------


def module_name(path: Path, root: Path = PACKAGE) -> str:
    """`attention.merge` for anchorctx/attention/merge.py; `attention` for its `__init__.py`; "" for the package's."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute dotted names that the code imports; `package` is the dotted package that holds it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violation(module: str, target: str) -> str | None:
    """Why `module` (under anchorctx) must not import `target` (absolute), or None."""
    top, _, rest = target.partition(".")
    if top != "anchorctx":
        if top in ONLY_IN and not any(within(module, owner) for owner in ONLY_IN[top]):
            return f"only {', '.join(ONLY_IN[top])} may import {top}"
        if any(within(module, owner) for owner in NEVER_IN.get(top, ())):
            return f"must not import {top}"
        return None
    layer = module.split(".")[0]
    allowed = FOUNDATION | MAY_IMPORT.get(layer, set()) | {layer, "__version__"}
    return None if any(within(rest, name) for name in allowed) else f"{layer or 'anchorctx'} must not import {target}"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    package = ".".join(["anchorctx", *module.split(".")]).rstrip(".")
    package = package if is_package else package.rpartition(".")[0]
    found = (violation(module, target) for target in imported(ast.parse(source), package))
    return [f"anchorctx.{module}: {reason}" for reason in found if reason]


def test_every_module_belongs_to_a_layer() -> None:
    layers = {module_name(path).split(".")[0] for path in SOURCES} - {""}
    assert layers <= set(MAY_IMPORT), f"no rule for {layers - set(MAY_IMPORT)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path) or "anchorctx")
def test_imports_go_in_the_right_direction(path: Path) -> None:
    assert not violations(module_name(path), path.read_text(), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.loop", "from anchorctx.evals.runner import run"),
        ("train.loop", "import anchorctx.evals"),
        ("train.loop", "from anchorctx import evals"),
        ("train.loop", "def f():\n    from anchorctx.evals import runner"),
        ("train.loop", "from ..evals import runner"),
        ("train.loop", "import importlib\nimportlib.import_module('anchorctx.evals')"),
        ("evals.runner", "from anchorctx.train.loop import train"),
        ("attention.merge", "from anchorctx.models import load"),
        ("integrations.collator", "from anchorctx.data.loader import RowLoader"),
        ("kvcomm.cache", "from anchorctx.attention.merge import anchor_attention"),
        ("kvcomm.cache", "from anchorctx.attention import attend"),
        ("models.load", "from anchorctx.parallel import dist"),
        ("data.loader", "from anchorctx.attention import attend"),
        ("train.loop", "from anchorctx.plan.planner import Planner"),
        ("layout", "from anchorctx.data import packing"),
        ("models", "from anchorctx.testing.tiny import llama"),
        ("data.packing.packer", "import anchorctx.testing"),
        ("train.config", "import omegaconf"),
        ("train.config", "from hydra.core.config_store import ConfigStore"),
        ("attention.kernels.torch_varlen", "from flash_attn import flash_attn_func"),
        ("evals.runner", "import lm_eval.tasks"),
        ("train.dashboards", "import wandb"),
        ("models", "import deepspeed"),
        ("report.figures.style", "def f():\n    import torch"),
    ],
)
def test_planted_violations_are_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvcomm.cache", "from anchorctx.attention.rope import rotate\nfrom anchorctx.attention import rope"),
        ("attention.merge", "from .kernels.base import Kernel\nfrom . import reference\nfrom ..layout import Pattern"),
        ("train.loop", "from anchorctx.errors import UserError\nfrom anchorctx import __version__\nimport deepspeed"),
        ("records.wandb_run", "import wandb"),
        ("parallel.dist", "import deepspeed\nfrom anchorctx.attention import attend"),
        ("cli.commands", "import hydra\nfrom anchorctx.train.loop import train"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle, by depth-first search (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in arrows.get(module, set()):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            found.extend([sorted(group)] if len(group) > 1 else [])

    for module in arrows:
        if module not in order:
            visit(module)
    return found


def top_level_imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports while it is itself imported."""
    module = module_name(path)
    body = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    package = ".".join(["anchorctx", *module.split(".")]).rstrip(".")
    package = package if path.name == "__init__.py" else package.rpartition(".")[0]
    names = [name.partition(".")[2] for name in imported(ast.Module(body, []), package) if within(name, "anchorctx")]
    return {name if name in modules else name.rpartition(".")[0] for name in names} & modules - {module}


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {module_name(path) for path in SOURCES}
    assert circles({module_name(path): top_level_imports(path, modules) for path in SOURCES}) == []


def test_a_planted_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]


def test_importing_the_package_is_light() -> None:
    code = f"import sys, anchorctx; print([m for m in {LAZY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def imported_by(code: str) -> set[str]:
    """Modules that a new process has imported after `code`."""
    code = f"import sys\n{code}\nprint('|', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_refusals_import_nothing_slow(command: str) -> None:
    """Modules are counted rather than seconds, which depend on what else the machine does."""
    start = "from anchorctx.cli.main import main"
    slow = {*LAZY, "datasets", "pandas", "pyarrow", "scipy", "jinja2", "hydra", "omegaconf", "pydantic"}
    assert slow.isdisjoint(imported_by(f"{start}\nassert main([{command!r}, '--help']) == 0"))
    assert slow.isdisjoint(imported_by(f"{start}\nassert main([{command!r}, 'no_such_key=1']) == 2"))


# -- sizes and names --------------------------------------------------------------------------------------------------


def long_functions(source: str, limit: int = MAX_FUNCTION_LINES) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > limit]


def init_code(source: str) -> list[str]:
    """What an `__init__.py` holds besides its docstring, imports and dunder names."""
    return [ast.unparse(node).splitlines()[0] for node in ast.parse(source).body if not _belongs_in_init(node)]


def _belongs_in_init(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        dunders = {"__all__", "__version__", "__getattr__", "__dir__"}
        return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} <= dunders | {"lazily", "__name__"}
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("path", ALL_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert not long_functions(source)
    assert path.name not in ("utils.py", "common.py", "helpers.py")
    if path.name == "__init__.py":
        assert not init_code(source)


def test_size_limits_find_planted_cases() -> None:
    assert long_functions("def f():\n" + "    pass\n" * MAX_FUNCTION_LINES) == ["f"]
    assert long_functions("def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)) == []
    assert init_code("'''Doc.'''\nfrom a import b\nx = 1\ndef f(): ...\n") == ["x = 1", "def f():"]


# -- checkers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "pyright"])
def test_checkers_are_content(command: str) -> None:
    program, *arguments = command.split()
    binary = Path(sys.executable).parent / program
    done = subprocess.run([str(binary), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.parametrize(
    "package", ["anchorctx", "anchorctx.attention", "anchorctx.integrations", "anchorctx.kvcomm", "anchorctx.models"]
)
def test_every_public_name_can_be_imported_first(package: str) -> None:
    """Each in a process of its own: in this one the modules behind the names are imported already."""
    names = importlib.import_module(package).__all__
    asked = "; ".join(f"from {package} import {name}" for name in names)
    code = f"import {package} as p; assert not hasattr(p, 'nonsense'); {asked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
