"""What `qprune.verify` found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

TIE_STEPS = 1e-3
"""How far, in steps, a value may lie from the middle between two levels that got another level in the second run."""
CLOSE = 1e-3
"""How far outputs may differ, relative to the largest, where no code does."""


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one layer.

    status         "integer": computed in whole numbers, and equal to the fake-quantized layer but for rounding; "float": not in integers,
                   for the reason given; "failed": not equal, or the accumulator may overflow
    w_bits, a_bits distinct bits of its filters; bits of its input
    difference     largest |integer − fake-quantized| of its output, relative to the largest |output|, or to a thousandth of the largest
                   sum of magnitudes where that is more
    error          the largest part of the rounding that is allowed which was found: above 1, it failed
    flips          codes that came out differently because dividing by a scale rounds otherwise than multiplying by its inverse
    ulps           how far the farthest of these was from the middle between two levels
    changed        codes that were others in the fake-quantized network's own run
    worst_bits     of an accumulator for any input; observed_bits: for the inputs that were seen
    """

    name: str
    kind: str
    w_bits: tuple[int, ...]
    a_bits: int
    status: str
    reason: str = ""
    difference: float = 0.0
    error: float = 0.0
    flips: int = 0
    ulps: float = 0.0
    changed: int = 0
    worst_bits: int = 0
    observed_bits: int = 0


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Prints as a table.

    layers      in the order of the network
    samples     that were run
    difference  largest |integer − fake-quantized| of the network's output, relative to the largest |output|
    agreement   share of the samples whose largest output is the same; None where the output is not [samples, classes]
    changed     codes that differ between the two runs
    boundary    how far, in steps, the first of these were from the middle between two levels; what follows differs in consequence
    """

    layers: tuple[LayerCheck, ...]
    samples: int
    difference: float
    agreement: float | None
    changed: int
    boundary: float

    @property
    def ok(self) -> bool:
        """No layer failed, codes changed at boundaries only, and where none did the outputs are equal but for rounding."""
        sound = all(layer.status != "failed" for layer in self.layers) and self.boundary <= TIE_STEPS
        return sound and (self.changed > 0 or self.difference <= CLOSE)

    @property
    def problem(self) -> str:
        """In one line, why it is not `ok`."""
        failed = [f"layer {layer.name}: {layer.reason}" for layer in self.layers if layer.status == "failed"]
        if failed:
            return "; ".join(failed[:3])
        return f"outputs differ by {self.difference:.1e} of the largest; codes changed {self.boundary:.1e} steps from a boundary"

    @property
    def worst(self) -> LayerCheck | None:
        """The integer layer that came nearest to its limit, or passed it."""
        checked = [layer for layer in self.layers if layer.status != "float"]
        return max(checked, key=lambda layer: layer.error, default=None)

    @property
    def accumulator_bits(self) -> int:
        """The widest accumulator that a layer may need."""
        return max((layer.worst_bits for layer in self.layers), default=0)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        agreement = "" if self.agreement is None else f", same class {self.agreement:.2%}"
        caption = f"{'ok' if self.ok else 'FAILED'}: {self.samples} samples, outputs differ by {self.difference:.1e}{agreement}"
        caption += f"; {self.changed} codes changed" + (f", the first {self.boundary:.1e} steps from a boundary" if self.changed else "")
        table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        table.add_column("layer")
        for heading in ("w bits", "a bits", "difference", "of limit", "accumulator", "seen", "flips"):
            table.add_column(heading, justify="right")
        table.add_column("status")
        for row in self.layers:
            numbers = [f"{row.difference:.1e}", f"{row.error:.2f}", f"{row.worst_bits} bits", f"{row.observed_bits} bits", str(row.flips)]
            shown = numbers if row.worst_bits else ["–"] * 5
            status = f"{row.status}: {row.reason}" if row.reason else row.status
            table.add_row(row.name, _range(row.w_bits), str(row.a_bits), *shown, status)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _range(bits: tuple[int, ...]) -> str:
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]}–{bits[-1]}"
