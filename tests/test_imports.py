"""The rooms and arrows of DESIGN.md §2, read from the source: what there is, who imports whom, what
nobody may call, and how long files and functions may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room may import from the rooms of lower layers, and from those beside it.
LAYERS = (
    {"errors", "stats", "data", "values", "forking", "mapping", "pending", "queueing"},
    {"finite"},
    {"_build_info", "_host", "kernels"},
    {"state", "bypass", "watching"},
    {"originals"},
    {"ops"},
    {"models"},
    {"target"},
    {"norms"},
    {"packing", "linears"},
    {"layers", "attention", "fingerprint", "rotary"},
    {"preparation"},
    {"admission", "cutting"},
    {"tokenization", "engine", "training", "transfer", "budget"},
    {"heads", "pooling", "classification", "pairs", "static", "generation"},
    {"routes"},
    {"inference", "callers", "padded_call", "packed_forward", "sparse_forward", "arguments"},
    {"results", "few", "call", "assembly", "transformer_module"},
    {"session"},
    {"sentence_transformers", "patching", "explanation", "staging"},
    {"bench", "server"},
    {"cli", "corpus"},
    {"__main__"},
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
TESTING = "testing"  # the oracle for tests: imports what it likes, imported by no room

# Ways to run an op. None of them may lean on another: the reference is what the others are held to.
IMPLEMENTATIONS = (
    "sbert_fast.ops.reference",
    "sbert_fast.ops.extension",
    "sbert_fast.ops.torch_attention",
    "sbert_fast.kernels",
)

FORBIDDEN_CALLS = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "exit",
    "quit",
    "sys.exit",
    "os._exit",
    "eval",
    "exec",
}


def _module_name(path: Path) -> str:
    for folder, package in (("kernels/triton", "sbert_fast.kernels"), ("sbert_fast", "sbert_fast")):
        if path.is_relative_to(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            return ".".join([package, *(part for part in parts if part != "__init__")])
    raise ValueError(f"path must be in the package, got {path}")


FILES = {
    _module_name(path): path
    for folder in ("sbert_fast", "kernels/triton")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported_names(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Every module or attribute of this package that `module` imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            keep = len(parts) - node.level + (1 if is_package else 0)
            base = ".".join(parts[:keep]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> set[str]:
    """Modules of this package that `module` imports."""
    path = FILES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported_names(tree, module, is_package=path.name == "__init__.py")
    return {_nearest_module(name) for name in names if name.split(".")[0] == "sbert_fast"}


def _nearest_module(name: str) -> str:
    """The module that `name` is, or is an attribute of."""
    if name in FILES or name.removeprefix("sbert_fast.") in ("_host", "_build_info"):
        return name
    return _nearest_module(name.rpartition(".")[0])


def room(module: str) -> str:
    """The file or folder of the package that a module lives in; "" for the package itself."""
    return (module.split(".") + [""])[1]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether an import follows the arrows."""
    here, there = room(importer), room(imported)
    if here in ("", TESTING) or here == there:
        return True
    if there not in LAYER_OF:
        return False
    return LAYER_OF[there] <= LAYER_OF[here]


def implementation(module: str) -> str | None:
    """The implementation that a module belongs to, if it belongs to one."""
    for name in IMPLEMENTATIONS:
        if module == name or module.startswith(name + "."):
            return name
    return None


def forbidden_calls(tree: ast.AST) -> Iterator[str]:
    """Calls of functions that no library code may call, as "line: name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield f"{node.lineno}: {ast.unparse(node.func)}"


def test_every_module_has_a_room() -> None:
    rooms = {room(module) for module in FILES} - {"", TESTING}
    assert rooms <= set(LAYER_OF), "give the new room a layer in this file and in DESIGN.md"


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module: str) -> None:
    assert [name for name in sorted(imports_of(module)) if not is_allowed(module, name)] == []


@pytest.mark.parametrize("module", [name for name in FILES if implementation(name)])
def test_implementations_do_not_import_one_another(module: str) -> None:
    others = {implementation(name) for name in imports_of(module)} - {None, implementation(module)}
    assert others == set()


def test_imports_have_no_cycle() -> None:
    # A package imports its modules, and they one another through it: no cycle in this sense.
    graph = {
        module: {name for name in imports_of(module) if not module.startswith(name + ".")}
        for module in FILES
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in finished or module not in graph:
            return
        for name in sorted(graph[module]):
            visit(name, (*trail, module))
        finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", FILES)
def test_no_forbidden_calls(module: str) -> None:
    assert list(forbidden_calls(ast.parse(FILES[module].read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("sbert_fast.sentence_transformers.encoder", "sbert_fast.engine", True),
        ("sbert_fast.engine", "sbert_fast.packing", True),
        ("sbert_fast.models.bert", "sbert_fast.errors", True),
        ("sbert_fast.testing", "sbert_fast.ops.reference", True),
        ("sbert_fast.engine", "sbert_fast.sentence_transformers.encoder", False),
        ("sbert_fast.ops.dispatch", "sbert_fast.models.base", False),
        ("sbert_fast.errors", "sbert_fast.ops", False),
        ("sbert_fast.ops.dispatch", "sbert_fast.testing", False),
        ("sbert_fast.models.bert", "sbert_fast", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert is_allowed(importer, imported) is allowed


@pytest.mark.parametrize(
    "source",
    [
        "import sbert_fast.ops.reference",
        "from sbert_fast.ops import reference",
        "def late():\n    from .ops.reference import add_norm",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    names = imported_names(ast.parse(source), "sbert_fast.engine", is_package=False)
    assert {_nearest_module(name) for name in names} == {"sbert_fast.ops.reference"}


# What is never installed, and where it may be imported from.
IMPORTERS = {"tests": ("tests",), "benchmarks": ("benchmarks", "tools", "tests/benchmarks")}
IMPORTERS |= {"tools": ("tools", "tests/benchmarks")}


def test_tests_and_benchmarks_are_apart() -> None:
    """`tools -> benchmarks -> sbert_fast`; tests of the library import neither."""
    modules = {"tests": {path.stem for path in (ROOT / "tests").rglob("*.py")} - {"conftest"}}
    modules |= {room: {room} for room in ("benchmarks", "tools")}
    wrong = []
    for folder in ("benchmarks", "examples", "kernels", "sbert_fast", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tops = {n.split(".")[0] for n in imported_names(tree, name[:-3], is_package=False)}
            for owner, allowed in IMPORTERS.items():
                if tops & modules[owner] and not name.startswith(tuple(f"{a}/" for a in allowed)):
                    wrong.append(f"{name} imports from {owner}: {tops & modules[owner]}")
    assert wrong == []


@pytest.mark.parametrize("source", ["torch.load(path)", "import sys\nsys.exit(1)", "exit()"])
def test_every_forbidden_call_is_seen(source: str) -> None:
    assert len(list(forbidden_calls(ast.parse(source)))) == 1


# Their folders are rooms, as are these two.
SHELVES = ("csrc", "kernels", "tools")
FOLDERS = ("benchmarks", "sbert_fast")
_A_FILE = re.compile(r"[\w.]+\.(?:py|h|cpp|cu|cuh)\b")


def rooms_of_design() -> str:
    """The block of DESIGN.md that lists files and folders."""
    design = ROOT.joinpath("DESIGN.md").read_text(encoding="utf-8")
    return design.partition("## 2. The rooms")[2].split("```")[1]


def test_the_rooms_name_everything() -> None:
    package = ROOT / "sbert_fast"
    shelved = (path for shelf in SHELVES for path in (ROOT / shelf).iterdir() if path.is_dir())
    expected = {folder.relative_to(ROOT).as_posix() for folder in shelved if _has_sources(folder)}
    expected |= set(FOLDERS)
    for path in package.iterdir():
        if path.suffix == ".py" and path.name != "__init__.py" and path.name[0] != "_":
            expected.add(path.name)
        elif path.joinpath("__init__.py").is_file() and not path.is_symlink():
            expected.add(f"{path.name}/")
    text = rooms_of_design()
    missing = {name for name in expected if not re.search(rf"(?<![\w./]){re.escape(name)}", text)}
    assert missing == set()


def test_the_rooms_name_nothing_else() -> None:
    text = rooms_of_design()
    there = {path.name for folder in SIZED for path in sized_files(folder)} | {"setup.py"}
    named = set(_A_FILE.findall(text))
    folders = re.findall(r"^ *([\w./]+?)/?(?=  )", text, re.MULTILINE)
    folders = [name for name in folders if "." not in name]
    gone = [f for f in folders if not ((ROOT / f).is_dir() or (ROOT / "sbert_fast" / f).is_dir())]
    assert (sorted(named - there), gone) == ([], [])


# Where the length of files is limited, and what limits it.
SIZED = ("sbert_fast", "kernels", "csrc", "benchmarks", "tools", "tests")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 350
REASON, REASON_LINES = "Long because", 12


def _has_sources(folder: Path) -> bool:
    return bool(sized_files(folder.relative_to(ROOT).as_posix()))


def sized_files(folder: str) -> list[Path]:
    found = (ROOT / folder).rglob("*")
    return sorted(p for p in found if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"))


def function_lines(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every function and its lines, its docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert [f for f in function_lines(tree) if f[1] > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("folder", SIZED)
def test_files_are_short_or_say_why_not(folder: str) -> None:
    long = {}
    for path in sized_files(folder):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_FILE_LINES and REASON not in "\n".join(lines[:REASON_LINES]):
            long[path.relative_to(ROOT).as_posix()] = len(lines)
    assert long == {}, "split it, or say in its first lines why it is long"


def test_docstrings_are_not_counted() -> None:
    source = 'def f(x):\n    """One.\n\n    Two.\n    """\n    return x\n'
    assert list(function_lines(ast.parse(source))) == [("f", 2)]
