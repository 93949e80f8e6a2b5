"""Compile every kernel for NVIDIA GPUs without having one, and hold the machine code to a budget.

    python -m qprune.kernels.aot [--quick] [--json FILE]

Prints a row per kernel configuration: registers, spills, shared memory, kinds of instructions, and issue slots per element of the main
loop (an instruction is one slot, a comparison, minimum or maximum two). It exits with 1 if a row breaks its BUDGET. The cubins are those
that the launchers would run: blocks from launch.py, constants from the same functions, pointers on 16 bytes. Must run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import launch
from .errors import BackendError
from .layout import Layout

SHARED_LIMIT = {80: 166912, 90: 232448}
PROCESSORS = {80: 108, 90: 132}

_GRIDS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((15,), (8,)),
    3: ((1, 3, 15), (0.5, 1.5, 7.5)),
    5: ((3, 7, 15, 63, 255), (0, 0, 0, 0, 0)),
    8: ((0, 3, 7, 15, 31, 63, 255, -1), (0, 2, 4, 8, 16, 32, 128, 0)),
}

KERNELS = ("forward", "backward", "finish")

FAMILIES = {
    "flat": Layout(2**26, 1, 2**26, 1, 2**26),
    "huge flat": Layout(2**33, 1, 2**33, 1, 2**33),
    "rows": Layout(512 * 4608, 512, 4608, 1, 512 * 4608),
    "short rows": Layout(960 * 9, 960, 9, 1, 960 * 9),
    "planes": Layout(32 * 256 * 3136, 256, 3136, 1, 32 * 256 * 3136),
    "channels": Layout(32 * 256 * 3136, 256, 1, 1, 32 * 256 * 3136),
    "joint flat": Layout(32 * 256 * 3136, 1, 32 * 256 * 3136, 3, 256),
    "joint rows": Layout(512 * 4608, 512, 4608, 3, 4608),
}


@dataclass(frozen=True)
class Config:
    """One kernel configuration. dtype is that of x, output and gradient; offset says whether the backward pass sums for d_offset."""

    kernel: str
    family: str
    k: int
    dtype: str = "bf16"
    noise: bool = False
    offset: bool = False
    arch: int = 90


@dataclass(frozen=True)
class Budget:
    """Upper bounds for K candidates: registers + K · registers_each, and so on; noise adds the cost of its generator."""

    registers: int
    registers_each: int
    slots: float
    slots_each: float
    registers_noise: int = 0
    slots_noise: float = 0
    shared: int = 4096

    def bounds(self, k: int, noise: bool, arch: int) -> dict[str, float]:
        return {
            "registers": min(self.registers + k * self.registers_each + noise * self.registers_noise, 255),
            "stack": 0,
            "spills": 0,
            "shared": min(self.shared, SHARED_LIMIT[arch]),
            "frnd": 0,
            "fmnmx": 0,
            "slots": self.slots + k * self.slots_each + noise * self.slots_noise,
        }


BUDGET = {
    "forward": Budget(64, 8, 12, 5, 80, 80),
    "forward joint flat": Budget(64, 8, 18, 5),
    "forward joint rows": Budget(64, 8, 18, 5),
    "forward channels": Budget(128, 12, 12, 5),
    "forward short rows": Budget(100, 8, 30, 5),
    "backward": Budget(100, 16, 20, 11.5, 32, 90),
    "backward joint flat": Budget(100, 16, 30, 11.5),
    "backward joint rows": Budget(100, 16, 30, 11.5),
    "backward channels": Budget(255, 0, 20, 11.5),
    "backward short rows": Budget(255, 0, 35, 11.5),
    "finish": Budget(128, 0, 0, 0),
}
"""By kernel, or by kernel and family where that differs: what Triton 3.5, 3.6 and 3.9 give, with a margin of 10 to 20 %.

A kernel that is to be bound by the memory of an H200 has 31 slots per element in the forward and 47 in the backward pass in bf16, 62 and
93 in fp32 (33e12 issue slots and 4.3e12 bytes per second).
"""


def configs(quick: bool) -> Iterator[Config]:
    """The configurations of the table; quick is the subset for a test run."""
    for kernel in ("forward", "backward"):
        backward = kernel == "backward"
        yield from (Config(kernel, family, 5, offset=backward) for family in FAMILIES)
        yield from (Config(kernel, family, 5, "fp32", offset=backward) for family in ("flat", "rows"))
        yield Config(kernel, "rows", 8, "fp32")
        yield Config(kernel, "flat", 5, noise=True)
        yield Config(kernel, "flat", 5, arch=80)
        if quick:
            continue
        others = [family for family in FAMILIES if family not in ("flat", "rows")]
        yield from (Config(kernel, family, 5, "fp32", offset=backward) for family in others)
        yield from (Config(kernel, family, k, dtype) for family in ("flat", "rows") for k in (1, 3) for dtype in ("bf16", "fp32"))
        yield from (Config(kernel, family, 8) for family in ("flat", "rows", "channels"))
        yield Config(kernel, "rows", 3, "fp32", noise=True)
        yield from (Config(kernel, family, 5, "fp32", arch=80) for family in ("rows", "channels", "joint rows"))
    yield from (Config("backward", family, 5, dtype) for family in ("flat", "channels") for dtype in ("bf16", "fp32"))
    yield from (Config("finish", family, 5, offset=True) for family in ("flat", "rows"))


def _specialised(c: Config) -> tuple[Any, dict[str, Any], int, dict[str, str]]:
    """The kernel, its compile-time arguments, warps and pointer types, as the launchers choose them."""
    from . import candidates, quantize, quantize_grad

    steps, zero_point = _GRIDS[c.k]
    layout = FAMILIES[c.family]
    groups = tuple(k % layout.groups for k in range(c.k))
    v = launch.view(layout)
    device = launch.Device(PROCESSORS[c.arch], c.arch)
    itemsize = 4 if c.dtype == "fp32" else 2
    streams = dict.fromkeys(("p_x", "p_y", "p_g", "p_dx"), f"*{c.dtype}")
    pointers = {**streams, "p_seed": "*i64" if c.noise else "*fp32"}
    if c.kernel == "forward":
        tile = launch.forward(v, itemsize, device)
        return quantize.mix_quantize_fwd_kernel, candidates.constants(v, tile, steps, zero_point, groups, c.noise), tile.warps, pointers
    tile = launch.backward(v, itemsize, device)
    if c.kernel == "backward":
        shared = candidates.constants(v, tile, steps, zero_point, groups, c.noise)
        constants = {**shared, **quantize_grad.grad_constants(tile, steps, (0,) * c.k, c.offset)}
        return quantize_grad.mix_quantize_bwd_kernel, constants, tile.warps, pointers
    final = launch.finish(v.channels, tile.splits_outer * tile.splits_inner)
    constants = quantize_grad.finish_constants(final, steps, groups, c.offset)
    return quantize_grad.mix_quantize_bwd_kernel_finish, constants, final.finish_warps, pointers


def _compile(c: Config) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps, pointers = _specialised(c)

    sizes = asdict(launch.view(FAMILIES[c.family]))

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.startswith("p_"):
            return pointers.get(name, "*fp32")
        return "i64" if sizes.get(name, 0) >= 2**31 else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", c.arch, 32), options={"num_warps": warps, "enable_fp_fusion": True})


def _disassemble(cubin: bytes) -> str:
    """What cuobjdump says about resources and code. The tool comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        raise BackendError(f"{tool} is missing: install Triton from its Linux wheel to check compiled kernels")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> list[tuple[int, str]]:
    """(address, instruction) without predicates."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][^;]*);", sass)
    return [(int(address, 16), text.strip()) for address, text in found]


def _innermost_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of the shortest loop that stores to global memory; empty if there is none."""
    best: list[str] = []
    for address, text in code:
        target = re.search(r"^BRA.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in code if int(target[1], 16) <= a <= address]
            if any(t.startswith("STG") for t in body) and (not best or len(body) < len(best)):
                best = body
    return best


def _slots(body: list[str], itemsize: int, outputs: int) -> float:
    """Issue slots per element of x in a loop body, which is known by the bytes that it stores."""
    widths = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}
    stores = [t.split()[0] for t in body if t.startswith("STG")]
    elements = sum(next((width for key, width in widths.items() if key in op), 4) for op in stores) / itemsize / outputs
    issued = sum(2 if re.match(r"FMNMX|[FHI]SETP", t) else 1 for t in body)
    return issued / elements if elements else 0.0


def measure(c: Config) -> dict[str, Any]:
    """Compile one configuration: its fields and what the machine code uses."""
    compiled = _compile(c)
    sass = _disassemble(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    if usage is None:
        raise BackendError("cuobjdump printed no resource usage: this Triton's tools are of an unknown version")
    code = _instructions(sass)
    outputs = FAMILIES[c.family].groups if c.kernel == "forward" else 1
    body = [] if c.kernel == "finish" else _innermost_loop(code)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, text) is not None for _, text in code)

    return {
        **asdict(c),
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": count(r"LDL|STL"),
        "shared": int(compiled.metadata.shared),
        "ldg128": count(r"LDG\S*\.128"),
        "stg128": count(r"STG\S*\.128"),
        "frnd": count("FRND"),
        "fmnmx": count("FMNMX"),
        "slots": round(_slots(body, 4 if c.dtype == "fp32" else 2, outputs), 1),
        "threads": 32 * int(compiled.metadata.num_warps),
    }


def _wide(row: dict[str, Any]) -> bool:
    """Whether the kernel streams 16 bytes per access: bf16 channels side by side take 8, and rows of 9 elements are not aligned."""
    v = launch.view(FAMILIES[row["family"]])
    narrow = v.unit and row["dtype"] != "fp32"
    return bool(row["kernel"] != "finish" and v.align == 16 and not narrow)


def violations(row: dict[str, Any]) -> list[str]:
    """What a row of the table breaks in its BUDGET, in words."""
    budget = BUDGET.get(f"{row['kernel']} {row['family']}", BUDGET[row["kernel"]])
    bounds = budget.bounds(row["k"], row["noise"], row["arch"])
    found = [f"{name} {row[name]} > {bound}" for name, bound in bounds.items() if row[name] > bound]
    if row["registers"] * row["threads"] > 65536:
        found.append(f"{row['registers']} registers in {row['threads']} threads do not fit a multiprocessor")
    if _wide(row) and not (row["ldg128"] and row["stg128"]):
        found.append("no 16-byte loads and stores")
    return found


def table(quick: bool = False) -> list[dict[str, Any]]:
    """Compile and measure all configurations: a dict per row, with `violations` as a list of words, empty where the budget holds."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError("kernels cannot be compiled while TRITON_INTERPRET=1: unset it for this process")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(f"Triton is needed to compile kernels and is not installed ({error}): pip install triton") from error
    rows = [measure(c) for c in configs(quick)]
    return [{**row, "violations": violations(row)} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qprune.kernels.aot", description="Compile every kernel without a GPU and check its budget."
    )
    parser.add_argument("--quick", action="store_true", help="a representative subset, under a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = table(arguments.quick)
    columns = [name for name in rows[0] if name not in ("threads", "violations")]
    width = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    print("  ".join(name.rjust(width[name]) for name in columns))
    for row in rows:
        print("  ".join(str(row[name]).rjust(width[name]) for name in columns), *(f"  ! {what}" for what in row["violations"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["violations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
