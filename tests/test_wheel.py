# SPDX-License-Identifier: Apache-2.0
"""The wheel, built and installed elsewhere, holds all it needs: the command, the template, the pocket."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def release_check(root: Path, dist: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / ".ci" / "release_check.py")
    return subprocess.run([sys.executable, script, str(root), str(dist)], capture_output=True, text=True)


def test_what_is_built_is_ready_to_be_released(dist: Path) -> None:
    done = release_check(ROOT, dist)
    assert (done.returncode, done.stdout) == (0, "ready to be released\n"), done.stderr


def test_what_keeps_a_release_back_is_said(dist: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "optimum_calibprune").mkdir(parents=True)
    (root / "optimum_calibprune" / "__init__.py").write_text('__version__ = "9.9"\n')
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## 9.8\n")
    (root / "README.md").write_text("[a](docs/none.md)\n```\n")
    (root / "LICENSE").write_text("Mine.")
    done = release_check(root, dist)
    assert done.returncode == 1
    version = next(dist.glob("*.whl")).name.split("-")[1]
    assert done.stdout.splitlines() == [
        f"__init__.py says version 9.9, the wheel {version}",
        f"CHANGELOG.md begins with '9.8'; for {version} it begins with '0.1.0 (unreleased)'",
        "README.md links to docs/none.md, which is not there",
        "README.md has a block of code without an end",
        "the wheel's description is not README.md",
        "the wheel has no LICENSE",
        "the sdist has no LICENSE",
    ]
    assert "must hold one wheel and one sdist" in release_check(root, tmp_path).stdout


def test_the_wheel_holds_code_data_template_and_registration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "optimum/commands/register/register_calibprune.py" in names
    assert "optimum_calibprune/publishing/model_card_template.md" in names
    assert "optimum_calibprune/pocket/model/model.safetensors" in names
    assert "optimum_calibprune/calibration/seeds.json" in names
    assert {f"optimum_calibprune/pocket/probes/{c}.jsonl" for c in ("general", "code")} <= names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/")) or n == "optimum/__init__.py"]
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "optimum_calibprune").rglob("*.py")}
    assert sources - names == {"optimum_calibprune/_optimum_register.py"}, "that one is moved to where optimum looks"


def test_the_folder_of_the_space_holds_the_package_and_names_what_both_need(wheel: Path, tmp_path: Path) -> None:
    script = str(ROOT / ".ci" / "space_bundle.py")
    subprocess.run([sys.executable, script, str(wheel), str(tmp_path / "space")], check=True, capture_output=True)
    found = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {"app.py", "README.md", "optimum_calibprune/pocket/model/model.safetensors"} <= found
    required = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert {"torch>=2.10", "matplotlib>=3.9"} <= set(required)
    assert not [
        line for line in required if ";" in line or line.startswith(("pytest", "gradio", "optimum-calibprune"))
    ]
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.fixture
def environment(wheel: Path, tmp_path: Path) -> Path:
    """A virtual environment with the libraries of this one and the wheel, but not this checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name == "optimum":
            shutil.copytree(entry, site / "optimum", ignore=shutil.ignore_patterns("register_calibprune.py"))
        elif "optimum_calibprune" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return python


def test_the_installed_wheel_prunes_the_pocket_from_another_folder(environment: Path, tmp_path: Path) -> None:
    code = (
        "import sys, optimum_calibprune\n"
        f"assert optimum_calibprune.__file__.startswith({str(tmp_path)!r}), optimum_calibprune.__file__\n"
        "from optimum.commands.optimum_cli import main\n"
        "sys.argv[1:] = 'calibprune prune pocket --samples 8 --length 64 --capabilities math --output out'.split()\n"
        "main()"
    )
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may name a checkout
    done = subprocess.run(
        [str(environment), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=bare
    )
    assert done.returncode == 0, done.stderr
    assert "math (worst)" in done.stdout
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")
