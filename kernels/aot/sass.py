"""What a compiled kernel uses, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..errors import BackendError

COUNTED = {
    "ldg128": r"LDG\S*\.128|LDGSTS\S*\.128",
    "stg128": r"STG\S*\.128",
    "mma": r"[HI]GMMA|[HI]MMA",
    "frnd": "FRND",
    "fmnmx": "FMNMX",
}
"""Columns of the table → the instructions that they count."""


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


class Code:
    """The machine code of one compiled kernel.

    use  registers per thread, bytes of stack and shared memory, spills, the COUNTED instructions, and slots per element
    """

    def __init__(self, compiled: Any, itemsize: int, outputs: int) -> None:
        sass = _disassemble(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", sass)
        if usage is None:
            raise BackendError("cuobjdump printed no resource usage: this Triton's tools are of an unknown version")
        code = _instructions(sass)
        self.instructions = [text for _, text in code]
        self.use: dict[str, Any] = {
            "registers": int(usage[1]),
            "stack": int(usage[2]),
            "spills": self.count("LDL|STL"),
            "shared": int(compiled.metadata.shared),
            **{name: self.count(pattern) for name, pattern in COUNTED.items()},
            "slots": round(_slots(_innermost_loop(code), itemsize, outputs), 1) if itemsize else None,
            "threads": 32 * int(compiled.metadata.num_warps),
        }

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, text) is not None for text in self.instructions)
