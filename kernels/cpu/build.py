"""Compile the C++ sources beside this file into one shared library, with ninja and a C++ compiler.

The library exports plain C functions and is opened through ctypes, so it needs no Python headers and no binding generator and compiles in
seconds. Its name carries a hash of the sources, of torch's version and of the vector instructions of this machine: a library
that does not fit is not found, rather than found and wrong. This file imports nothing from the package: setup.py can run it by its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = tuple(HERE / f"{name}.cpp" for name in ("mix_quantize", "forward", "backward"))
_MACHINE_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def capability() -> str:
    """The instructions that the kernels are compiled for: "AVX512", "AVX2" or "DEFAULT" (whatever the compiler's baseline has)."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in _MACHINE_FLAGS and platform.machine() in ("x86_64", "AMD64") else "DEFAULT"


def _flags() -> list[str]:
    name = capability()
    # Contraction would give codes that depend on the compiler: the reference rounds after each operation.
    return [
        *("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fopenmp"),
        *(f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        *_MACHINE_FLAGS.get(name, []),
    ]


def library_name() -> str:
    """The file name of the library for these sources, this torch and this machine."""
    digest = hashlib.sha256(repr((torch.__version__, _flags())).encode())
    for path in sorted([*HERE.glob("*.h"), *SOURCES]):
        digest.update(path.read_bytes())
    return f"qprune_cpu_{capability().lower()}_{digest.hexdigest()[:16]}.so"


def compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ that exists."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def _ninja() -> str:
    """The ninja program: of the Python package, or the one on the path."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("no ninja found: pip install ninja")
    return found


def _plan(command: list[str], library: str) -> str:
    """The build file: one object per source, and the library."""
    root = Path(torch.__file__).parent
    # torch's own copy of the OpenMP runtime: a second one would bring a second pool of threads
    openmp = [str(path) for folder in (root / "lib", root.parent / "torch.libs") for path in sorted(folder.glob("libgomp*.so*"))[:1]]
    compile_words = [*command, *_flags(), "-isystem", str(root / "include"), "-c"]
    link_words = [*command, "-shared", "-fopenmp", "-Wl,--as-needed"]
    libraries = [*openmp, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]

    def escaped(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    objects = [f"{source.stem}.o" for source in SOURCES]
    return "\n".join(
        [
            f"rule compile\n command = {shlex.join(compile_words).replace('$', '$$')} $in -o $out",
            f"rule link\n command = {shlex.join(link_words).replace('$', '$$')} $in {shlex.join(libraries).replace('$', '$$')} -o $out",
            *(f"build {name}: compile {escaped(source)}" for name, source in zip(objects, SOURCES, strict=True)),
            f"build {library}: link {' '.join(objects)}\n",
        ]
    )


def build(output: Path) -> None:
    """Compile into the file `output`, which appears complete or not at all. Raises RuntimeError with one line if that is impossible."""
    command = compiler()
    if platform.system() != "Linux":
        raise RuntimeError(f"the C++ kernels are built on Linux only, not on {platform.system()}")
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or set CXX")
    ninja = _ninja()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=output.parent) as folder:
            (Path(folder) / "build.ninja").write_text(_plan(command, "library.so"))
            result = subprocess.run([ninja, "-C", folder], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                lines = (result.stdout + result.stderr).splitlines() or ["no message"]
                reasons = [line for line in lines if "error" in line] or [line for line in lines if "FAILED" not in line] or lines
                raise RuntimeError(f"{command[0]} failed on the C++ kernels: {reasons[0].strip()}")
            (Path(folder) / "library.so").replace(output)
    except OSError as error:
        raise RuntimeError(f"could not compile the C++ kernels with {command[0]}: {error}") from error


def cache_folder() -> Path:
    """Where libraries that are compiled at first use are kept: the folder of torch's own extensions."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "qprune"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions" / "qprune"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes. The system releases it when its holder ends, however it ends."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
