"""One compilation of a kernel: what goes in, what is allowed to come out, and the compiler's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHARED_LIMIT = {80: 166912, 90: 232448}
"""Bytes of shared memory that one block can have, by compute capability."""

PROCESSORS = {80: 108, 90: 132}


@dataclass(frozen=True)
class Budget:
    """What the machine code may use. No kernel may spill, use the stack, or need more than the device has; that is always checked.

    registers  per thread, at most
    slots      issue slots per element in the innermost storing loop, at most (None: not counted). One instruction is one slot, a
               comparison, minimum or maximum two. A kernel that is to be bound by the memory of an H200 has 31 slots per element in a bf16
               forward pass, 47 in a backward pass, and 62 and 93 in fp32 (33e12 issue slots and 4.3e12 bytes per second)
    shared     bytes, at most
    require    regular expressions of instructions that must occur
    forbid     … that must not
    """

    registers: float
    slots: float | None = None
    shared: int = 232448
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ("FRND", "FMNMX")


@dataclass(frozen=True)
class Build:
    """A kernel with everything that decides about its machine code, as its launcher would choose it.

    kernel, case  what the row is called
    types         argument → "*bf16", "i32", "i64", "fp32", …, or a tuple of them for a tuple argument; every pointer is on 16 bytes
    divisible     integer arguments that 16 divides
    itemsize      bytes of what the innermost loop stores, for counting slots per element; 0: slots are not counted
    outputs       tensors that the loop stores
    """

    kernel: str
    case: str
    function: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    budget: Budget
    warps: int = 4
    stages: int = 3
    arch: int = 90
    divisible: tuple[str, ...] = ()
    itemsize: int = 0
    outputs: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def compile(self) -> Any:
        """Triton's compiled kernel, for the architecture, on a machine with or without a GPU."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {name: "constexpr" if name in self.constants else self.types[name] for name in self.function.arg_names}
        aligned: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, (name, kind) in enumerate(signature.items()):
            if isinstance(kind, tuple):
                aligned.update({(i, j): [["tt.divisibility", 16]] for j, part in enumerate(kind) if part.startswith("*")})
            elif kind.startswith("*") or name in self.divisible:
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.function, signature=signature, constexprs=dict(self.constants), attrs=aligned)
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **self.options}
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
