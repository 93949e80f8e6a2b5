"""The residuals that input gates decide by, of a batch that is trained on in parts: those of the whole batch, as if it came in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qprune.accumulation import observing, split
from qprune.nn.bitgates import BitGate
from qprune.ranks import mean_over_ranks


class _Told:
    """What one gate is given in every one of its calls in a pass.

    known  residuals to decide by, per call; beyond them those that the gate has
    share  of the part in the batch, while residuals are collected: used is then the p of every call, sums the mean so far
    """

    def __init__(self, gate: BitGate) -> None:
        self.gate, self.share, self.call = gate, 0.0, 0
        self.known: list[Tensor] = []
        self.used: list[Tensor] = []
        self.sums: list[Tensor] = []

    def part(self, share: float) -> None:
        self.share, self.call = share, 0

    def __call__(self, errors: Tensor) -> None:
        if self.call < len(self.known):
            self.gate.errors.copy_(self.known[self.call])
        if self.share:
            if self.call == len(self.sums):
                self.sums.append(torch.zeros_like(errors))
                self.used.append(self.gate())
            self.sums[self.call] += self.share * errors
        self.call += 1


@contextmanager
def of_the_batch(
    model: nn.Module, gates: Sequence[BitGate], forward: Callable[..., object], batch: Sequence[Tensor], parts: int
) -> Iterator[Callable[[], None]]:
    """Within, the gates decide by the mean residuals over the batch, and `observe` no more; what is yielded is to be called before every
    forward pass of a part.

    They are found by passes of the parts without gradients: one if the gates decide by them as they did before; otherwise again with these
    decisions, since deeper layers then see other inputs, once per gate at most. The ranks of a distributed job agree on the mean.
    """
    told = [_Told(gate) for gate in gates]
    for gate, one in zip(gates, told, strict=True):
        gate.teller = one

    def begin(share: float = 0.0) -> None:
        for one in told:
            one.part(share)

    try:
        settled = False
        while not settled:
            for share, part in split(model, batch, parts):
                begin(share)
                with observing(model):
                    forward(*part)
            settled = _decided(told)
        yield begin
    finally:
        for gate in gates:
            gate.teller = None


@torch.no_grad()
def _decided(told: Sequence[_Told]) -> bool:
    """Take over what a pass found; whether the gates had decided by it already."""
    sums = [value for one in told for value in one.sums]
    if not sums:
        return True
    means = iter(mean_over_ranks(torch.cat(sums)).split([len(value) for value in sums]))
    same = []
    for one in told:
        one.known = []
        for used, mean in zip(one.used, means, strict=False):
            errors = one.gate.errors
            errors.copy_(torch.where(mean.isfinite(), mean.to(errors.dtype), errors))
            one.known.append(errors.clone())
            same.append((one.gate() == used).all())
        one.used, one.sums = [], []
    return bool(torch.stack(same).all())
