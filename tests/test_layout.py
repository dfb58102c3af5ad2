"""The rooms of the project and the direction of its imports, read from the source."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gptoss_jax", "sharding", "pallas_kernels", "tools", "benchmarks")
COMMANDS = {"serve", "generate", "chat", "harmony", "bench", "plan", "convert"}

EVERYWHERE = {"types", "errors"}
"""What every room of gptoss_jax may import."""

ALLOWED = {
    "pallas_kernels": set(),
    "sharding": set(),
    "sharding.processes": {"sharding"},
    "sharding.compiled": {"sharding"},
    "types": set(),
    "errors": set(),
    "runtime": {"pallas_kernels"},
    "model": {"runtime", "sharding", "pallas_kernels"},
    "checkpoints": {"model", "runtime", "sharding", "pallas_kernels"},
    "text": set(),
    "engine": {"model", "runtime", "sharding", "sharding.processes", "sharding.compiled", "pallas_kernels"},
    "serving": {"engine", "text", "checkpoints", "model", "runtime", "sharding", "sharding.processes"},
}
ALLOWED["planner"] = {*ALLOWED["serving"], "serving", "sharding.compiled", "pallas_kernels"}
ALLOWED["benching"] = {*ALLOWED["planner"], "planner"}
ALLOWED["commands"] = {*ALLOWED["benching"], "benching"}
ALLOWED["command"] = {*ALLOWED["commands"], "commands"}
ALLOWED["tools"] = ALLOWED["benchmarks"] = {*ALLOWED["command"], "command"}


def room(module: str) -> str:
    """The room that a module is in: a package, a folder of one, or a single file that stands for itself."""
    package, *inner = module.split(".")
    if package == "sharding":
        return f"sharding.{inner[0]}" if inner[:1] in (["processes"], ["compiled"]) else "sharding"
    if package != "gptoss_jax":
        return package
    name = inner[0] if inner else "__init__"
    return "command" if name in COMMANDS else name


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def names() -> set[str]:
    return {name for name, _ in modules()}


def imports(path: Path) -> Iterator[str]:
    """The project's own modules that a file imports, wherever in the file and for whatever purpose."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in names() else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = []
    for module, path in modules():
        here = room(module)
        if module.partition(".")[0] != package or here == "__init__" or module == "sharding":
            continue  # The two __init__ re-export what is below them.
        allowed = ALLOWED[here] | {here} | (EVERYWHERE if package not in ("sharding", "pallas_kernels") else set())
        wrong += [f"{module} -> {name}" for name in imports(path) if room(name) not in allowed]
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    edges = {module: set(imports(path)) - {module} for module, path in modules()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for name in sorted(edges[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in edges:
        if not module.endswith("__init__") and module not in PACKAGES:
            visit(module, ())
