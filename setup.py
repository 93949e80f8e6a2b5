"""The package map, and the optional ahead-of-time build of the C++ kernels. Everything else is in pyproject.toml.

The folder kernels/ is installed as qprune.kernels. Where torch and a C++ compiler are at hand during the build
(`pip install --no-build-isolation .`) the C++ kernels are compiled into the wheel; elsewhere, and in editable installs, the wheel is pure
Python and they are compiled at first use. No install ever fails for want of them. QPRUNE_BUILD_CPU=0 leaves them out on purpose.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGES = {
    "qprune": "qprune",
    "qprune.nn": "qprune/nn",
    "qprune.recipes": "qprune/recipes",
    "qprune.resume": "qprune/resume",
    "qprune.quantizers": "qprune/quantizers",
    "qprune.search": "qprune/search",
    "qprune.export": "qprune/export",
    "qprune.commands": "qprune/commands",
    "qprune.compare": "qprune/compare",
    "qprune.study": "qprune/study",
    "qprune.tasks": "qprune/tasks",
    "qprune.benchmarks": "benchmarks",
    "qprune.kernels": "kernels",
    "qprune.kernels.aot": "kernels/aot",
    "qprune.kernels.cpu": "kernels/cpu",
}
PACKAGE_DATA = {
    "qprune": ["py.typed"],
    "qprune.kernels": ["README.md"],
    "qprune.kernels.cpu": ["*.cpp", "*.h"],
}

log = logging.getLogger("qprune.setup")


def compile_cpu(target: Path) -> bool:
    """Compile kernels/cpu into the folder target, against the torch of this environment. False, with a log line, where that can't be."""
    if os.environ.get("QPRUNE_BUILD_CPU", "1") == "0":
        log.info("qprune: C++ kernels left out (QPRUNE_BUILD_CPU=0)")
        return False
    if importlib.util.find_spec("torch") is None:
        log.info("qprune: no torch in the build environment; the C++ kernels will be compiled at first use")
        return False
    try:
        spec = importlib.util.spec_from_file_location("qprune_cpu_build", Path(__file__).resolve().parent / "kernels" / "cpu" / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(target / module.library_name())
    except Exception as error:
        log.warning("qprune: the C++ kernels were not compiled ahead of time, they will be at first use: %s", error)
        return False
    log.info("qprune: C++ kernels compiled into the wheel")
    return True


class QpruneDistribution(Distribution):
    compiled = False

    def has_ext_modules(self) -> bool:
        return self.compiled or super().has_ext_modules()


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "qprune", ignore_errors=True)  # what an earlier build left must not get into this wheel
        super().run()
        if not self.editable_mode:
            self.distribution.compiled = compile_cpu(Path(self.build_lib) / "qprune" / "kernels" / "cpu")


class BdistWheel(bdist_wheel):
    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        # The library is loaded by torch and uses nothing of Python's own interface: one wheel per platform, not per Python.
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if __name__ == "__main__":
    setup(
        packages=list(PACKAGES),
        package_dir=PACKAGES,
        package_data=PACKAGE_DATA,
        include_package_data=False,
        distclass=QpruneDistribution,
        cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    )
