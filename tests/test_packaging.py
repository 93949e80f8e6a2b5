"""What gets installed: every package folder, every source and data file, nothing else; and a bare checkout works as it lies."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("qprune", "kernels", "benchmarks")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
MAP = runpy.run_path(str(ROOT / "setup.py"), run_name="package_map")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def installed_name(path: Path) -> str:
    """Where a file of the checkout lies once installed."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("qprune/") else f"qprune/{relative}"


def test_a_bare_checkout_is_importable_without_a_warning(tmp_path: Path) -> None:
    code = "import qprune, qprune.kernels, qprune.functional; print(qprune.__file__, qprune.kernels.__file__, sep='\\n')"
    printed = run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert printed.splitlines() == [str(ROOT / "qprune" / "__init__.py"), str(ROOT / "kernels" / "__init__.py")]


def test_the_package_map_lists_every_package_folder() -> None:
    folders = {str(file.parent.relative_to(ROOT)) for top in TOPS for file in (ROOT / top).rglob("*.py")}
    assert set(MAP["PACKAGES"].values()) == folders
    assert {
        name: folder for name, folder in MAP["PACKAGES"].items() if installed_name(ROOT / folder / "_") != f"{name.replace('.', '/')}/_"
    } == {}


def test_one_version_everywhere() -> None:
    version = runpy.run_path(str(ROOT / "qprune" / "_version.py"))["__version__"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_requirement_has_a_tested_version() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    extra = re.search(r"^test = \[(.*?)\]", text, re.MULTILINE)
    assert dependencies and extra
    names = re.findall(r'"([A-Za-z0-9-]+)', dependencies[1] + extra[1])
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert "torch" in names
    assert {name.lower() for name in names} - {name.lower() for name in pinned} == set()


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in (*TOPS, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=IGNORED)
    stale = source / "build" / "lib" / "qprune" / "removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()

    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        source,
    )
    run(*pip, cwd=tmp_path, QPRUNE_BUILD_CPU="0")

    version = runpy.run_path(str(ROOT / "qprune" / "_version.py"))["__version__"]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"qprune-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(f"qprune-{version}.dist-info/entry_points.txt").decode()
    expected = {
        installed_name(ROOT / path.relative_to(source))
        for top in TOPS
        for path in (source / top).rglob("*")
        if path.is_file() and (top != "benchmarks" or path.suffix == ".py")
    }
    assert names == expected
    assert {"qprune/py.typed", "qprune/kernels/reference.py", "qprune/kernels/cpu/mix_quantize.cpp"} <= names
    assert "qprune = qprune.cli:main" in entry_points
