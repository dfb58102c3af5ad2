"""What the documentation points to is there: files, headings, commands and their flags."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for folder, pattern in ((".", "*.md"), ("docs", "*.md"), ("benchmarks", "**/*.md"), ("deploy", "**/*.md"))
    for page in (ROOT / folder).glob(pattern)
)
COMMANDS = {
    "gptoss_jax.serve": [""],
    "gptoss_jax.generate": [""],
    "gptoss_jax.chat": [""],
    "gptoss_jax.harmony": [""],
    "gptoss_jax.plan": [""],
    "gptoss_jax.bench": ["latency", "throughput", "start", "serve"],
    "tools.convert": [""],
}
"""Each command's subcommands; "" where it has none."""
OTHERS = {"--check", "--extra", "--isolated", "--no-sync", "--from", "--version"}
"""Flags of tools that are not ours; those of pages in deploy/ are checked by test_deploy.py."""
RENAMED = "CHANGELOG.md"
"""Names flags that are gone."""

FENCE = re.compile(r"(?ms)^ *```(\w*)\n(.*?)^ *```")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings: lower case, without punctuation, hyphens for spaces."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", prose(page)):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = next(i for i in range(1000) if (f"{slug}-{i}" if i else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`]*`", "``", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), f"{ids(page)}: {target}: outside of the repository"
        assert there.exists(), f"{ids(page)}: {target}: no such file"
        assert not anchor or anchor in anchors(there), f"{ids(page)}: {target}: no such heading"


def test_links_in_code_lead_to_headings() -> None:
    results = anchors(ROOT / "benchmarks" / "RESULTS.md")
    for folder in ("gptoss_jax", "sharding", "pallas_kernels", "benchmarks", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for anchor in re.findall(r"RESULTS\.md#([\w-]+)", file.read_text(encoding="utf-8")):
                assert anchor in results, f"{file}: RESULTS.md#{anchor}: no such heading"


@pytest.fixture
def flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The flags that a command's --help shows, its subcommands' included."""

    def read(name: str) -> set[str]:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
        found: set[str] = set()
        for subcommand in COMMANDS[name]:
            monkeypatch.setattr(sys, "argv", [name, *filter(None, [subcommand]), "--help"])
            with pytest.raises(SystemExit) as exit_:
                module.main()
            assert not exit_.value.code
            found |= set(FLAG.findall(capsys.readouterr().out))
        return found

    return read


def shown(page: Path) -> Iterator[tuple[str, set[str]]]:
    """Each command in a page's code, and the flags that it is given."""
    text = page.read_text(encoding="utf-8")
    code = [block for _, block in FENCE.findall(text)] + re.findall(r"`([^`\n]+)`", prose(page))
    for part in code:
        for line in re.sub(r"\\\n\s*", " ", part).splitlines():
            for name, words in re.findall(r"python -m ([\w.]+)([^|;&#]*)", line):
                # The wheel's name of the same command.
                yield {"gptoss_jax.convert": "tools.convert"}.get(name, name), set(FLAG.findall(words))


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_the_flags_that_pages_give_them(name: str, flags) -> None:
    known = flags(name)
    for page in PAGES:
        for command, given in shown(page):
            if command == name:
                assert given <= known, f"{ids(page)}: {name} has no {', '.join(sorted(given - known))}"


def test_every_flag_that_pages_name_exists(flags) -> None:
    known = OTHERS.union(*map(flags, COMMANDS), *map(declared, ("benchmarks", "tools")))
    for page in PAGES:
        if page.is_relative_to(ROOT / "deploy") or page.name == RENAMED:
            continue
        text = page.read_text(encoding="utf-8")
        named = set(FLAG.findall(re.sub(r"--xla_\w+|(XLA_FLAGS|LIBTPU_INIT_ARGS)=\S+", "", text)))
        assert named <= known, f"{ids(page)}: no command has {', '.join(sorted(named - known))}"


def declared(folder: str) -> Iterator[str]:
    """The flags that the modules of a folder declare."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                        yield str(argument.value)
