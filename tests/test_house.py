# SPDX-License-Identifier: Apache-2.0
"""The house keeps its rules: who may import whom, what is imported when, what stands in every file."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optimum_calibprune"
FILES = sorted(PACKAGE.rglob("*.py"))

# Data flows one way: each room may import the rooms named here, and itself.
MAY_IMPORT = {
    "record": set(),
    "values": {"record"},
    "records": {"record", "values"},
    "pocket": {"records"},
    "calibration": {"records", "values"},
    "pruning": {"records"},
    "capabilities": {"records", "pocket", "calibration"},
    "publishing": {"records", "values"},
    "machine": set(),
    "loading": {"records", "pocket", "pruning"},
    "planning": {"records", "values", "pruning"},
    "choices": {"records", "values", "pocket", "calibration", "capabilities", "loading"},
    "measuring": {"records", "calibration", "capabilities", "choices", "pruning"},
    "pruner": {
        "measuring",
        "records",
        "pocket",
        "calibration",
        "pruning",
        "capabilities",
        "publishing",
        "machine",
        "loading",
        "planning",
        "choices",
    },
    "shape": {"records", "calibration", "pruning", "choices", "loading", "planning"},
    "comparing": {"records", "capabilities", "publishing"},
    "study": {"records", "values", "pruner", "capabilities", "calibration", "publishing", "machine", "pocket"},
    "cli_study": {"study", "publishing"},
    "cli_compare": {"records", "comparing", "terminal"},
    "cli_text": {"records"},
    "terminal": set(),
    "cli": {
        "terminal",
        "records",
        "pruner",
        "pocket",
        "calibration",
        "publishing",
        "cli_study",
        "cli_compare",
        "cli_text",
    },
    "__init__": {"pruner", "records", "comparing", "choices", "publishing", "shape", "planning"},
    "_optimum_register": {"cli"},
}
HOMES = {  # each heavy library has one home
    "datasets": {
        "calibration/from_hub.py",
        "calibration/sources.py",
        "capabilities/harness.py",
        "capabilities/tasks.py",
    },
    "lm_eval": {"capabilities/engine.py", "capabilities/harness.py", "capabilities/score.py"},
    "greenlet": {"pruning/forward.py"},
    "matplotlib": {"publishing/plots.py"},
    "triton": {f"pruning/kernels/triton_{name}.py" for name in ("sweep", "select", "gram")},
    "gradio": set(),
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, wherever the import stands."""
    package = ["optimum_calibprune", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_the_rooms_before_them(path: Path) -> None:
    room = _room(path)
    rooms = {name.split(".")[1] for name in _imported(path) if name.startswith("optimum_calibprune.")}
    assert rooms - {"__version__", room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_have_one_home(library: str) -> None:
    users = {p.relative_to(PACKAGE).as_posix() for p in FILES if library in {n.split(".")[0] for n in _imported(p)}}
    assert users == HOMES[library]


def test_every_source_file_names_its_licence() -> None:
    tracked = [
        p
        for folder in ("optimum_calibprune", "tests", "benchmarks", "examples", "metrics")
        for p in (ROOT / folder).rglob("*.py")
    ]
    assert tracked
    assert [p for p in tracked if not p.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")] == []


def _modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in shown.stdout.splitlines()}


HEAVY = {"torch", "transformers", "datasets", "numpy", "lm_eval", "huggingface_hub"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import optimum_calibprune as o; o.CalibPruneConfig('pocket'); o.SparsityPattern"
    assert not _modules_after(code) & HEAVY


def test_the_command_line_imports_nothing_heavy_before_it_runs() -> None:
    assert not _modules_after("import optimum_calibprune.cli") & HEAVY
    answer = "import sys; sys.argv[1:] = ['calibprune', 'prune', '--help']\n"
    answer += "from optimum.commands.optimum_cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    assert not _modules_after(answer) & HEAVY


def test_public_names_are_there() -> None:
    import optimum_calibprune

    for name in optimum_calibprune.__all__:
        assert getattr(optimum_calibprune, name).__module__.startswith("optimum_calibprune.")
    with pytest.raises(AttributeError, match="has no attribute 'CalibPrunner'"):
        _ = optimum_calibprune.CalibPrunner


def test_the_site_has_every_page_and_names_only_what_is_there() -> None:
    import yaml

    def pages(entries: list) -> set[str]:
        found = [value for entry in entries for value in entry.values()]
        return {v for v in found if isinstance(v, str)}.union(*(pages(v) for v in found if isinstance(v, list)))

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert pages(site["nav"]) == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    named = [
        line[4:].rpartition(".") for line in (ROOT / "docs" / "api.md").read_text().splitlines() if line[:4] == "::: "
    ]
    assert len(named) > 10
    for module, _, name in named:
        assert getattr(importlib.import_module(module), name).__doc__


def test_pages_link_only_to_pages_and_are_all_listed() -> None:
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.is_file() and place.is_relative_to(docs), f"{page.name}: {target}"
    names = {page.name for page in docs.glob("*.md")} - {"index.md"}
    assert names == set(re.findall(r"\]\(([\w-]+\.md)\)", (docs / "index.md").read_text(encoding="utf-8")))
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("\ndocs/ ")[2].partition("\n```")[0]
    assert names - {"api.md"} == set(re.findall(r"^  ([\w-]+\.md) ", listed, re.MULTILINE))


def test_what_the_site_documents_raises_in_the_form_that_it_reads() -> None:
    """Each line of a Raises section, in the modules with documented names, is `Error: when`, or goes on with the one above."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for module in set(re.findall(r"^::: ([\w.]+)\.\w+$", text, re.MULTILINE)):
        for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "\nRaises:\n" in (said := ast.get_docstring(node) or ""):
                lines = said.partition("\nRaises:\n")[2].partition("\n\n")[0].splitlines()
                assert all(re.match(r"    (\w+: |    )", line) for line in lines), f"{module}.{node.name}"
