"""Parameters → mixing coefficients p."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import QPruneError

MODES = ("relaxed", "sampled", "fixed")


class Gate(nn.Module):
    """The mixing coefficients of K candidates, one row for a layer or one per filter.

    modes    "relaxed": softmax((logits + noise) / temperature); "sampled": the one-hot argmax of the same, with the softmax's gradient
             (straight-through Gumbel-softmax, 1611.01144); "fixed": the one-hot `choice`, with zero gradient
    logits   parameter [K] or [C, K], zero at the start (every candidate equally likely)
    noise    buffer like logits, zero unless `sample` drew Gumbel noise; drawn outside the forward pass, so that all ranks can draw the same
    forward  returns p, float32, of the shape of logits; rows sum to 1
    """

    noise: Tensor
    temperature: Tensor
    choice: Tensor

    def __init__(self, candidates: int, rows: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        shape = (candidates,) if rows is None else (rows, candidates)
        self.logits = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("noise", torch.zeros(shape, device=device), persistent=False)
        self.register_buffer("temperature", torch.ones((), device=device), persistent=False)
        self.register_buffer("choice", torch.zeros(shape[:-1], dtype=torch.int64, device=device))
        self.mode = "relaxed"

    def forward(self) -> Tensor:
        if self.mode == "fixed":
            hard = F.one_hot(self.choice, self.logits.size(-1)).to(torch.float32)
            return torch.where(torch.isfinite(hard), hard, self.logits.float())  # the logits keep a gradient, as every parameter must
        return _sharpened(self.logits.float() + self.noise, self.temperature, self.mode)

    def distribution(self) -> Tensor:
        """What the costs expect: p."""
        return self()  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> None:
        """Draw new Gumbel noise. With the same generator state, every rank draws the same."""
        device = None if generator is None else generator.device
        uniform = torch.rand(self.noise.shape, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
        self.noise.copy_(-(-uniform.log()).log())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float network's state_dict knows nothing of gates: they stay as they are instead of being reported as missing.
        if f"{prefix}logits" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{tuple(self.logits.shape)}, mode={self.mode}"


def _sharpened(noisy: Tensor, temperature: Tensor, mode: str) -> Tensor:
    """softmax(noisy / temperature) for "relaxed"; its one-hot argmax with the softmax's gradient for "sampled"."""
    soft = (noisy / temperature).softmax(-1)
    if mode == "relaxed":
        return soft
    hard = F.one_hot(soft.argmax(-1), noisy.size(-1)).to(soft.dtype)
    return hard + (soft - soft.detach())


class FilterGate(Gate):
    """One vector of logits for all filters of a layer, and a candidate of its own for every filter (Zur et al., 1904.09872).

    candidates  ordered pairs (weight bits, activation bits). As in the original the logits are zero at the start, but log(1/2) for 8-bit
                weights with 8-bit activations or without an activation (32)
    filters     F, the rows of p
    together    True: all filters take the same candidate ("sampled" then draws once for all of them)
    choice      buffer [F] int64
    forward     returns p [F, K]. "relaxed": softmax(logits / temperature) in every row; "sampled": a straight-through draw per filter;
                "fixed": the one-hot choice
    """

    def __init__(
        self, candidates: Sequence[tuple[int, int]], filters: int, together: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__(len(candidates), None, device)
        self.filters, self.together = filters, together
        self.register_buffer("noise", torch.zeros(1 if together else filters, len(candidates), device=device), persistent=False)
        self.register_buffer("choice", torch.zeros(filters, dtype=torch.int64, device=device))
        if len(candidates) > 1:
            costly = [pair in ((8, 8), (8, 32)) for pair in candidates]
            self.logits.data = torch.tensor([math.log(0.5) if c else 0.0 for c in costly], device=device)

    def forward(self) -> Tensor:
        if self.mode == "fixed":
            return super().forward()
        noisy = self.logits.float() + (self.noise if self.mode == "sampled" else 0.0)
        return _sharpened(noisy, self.temperature, self.mode).expand(self.filters, -1)

    def distribution(self) -> Tensor:
        """[K]: the probabilities with which every filter draws its candidate. The temperature changes them in relaxed mode only."""
        logits = self.logits.float()
        return (logits / self.temperature if self.mode == "relaxed" else logits).softmax(0)


class TiedGate(Gate):
    """The gate of a layer whose filters are pruned together with filters of other layers: the probability of 0 bits comes from a gate that
    all of them share.

        p[f, k] = p0[channel of f] · q[f, k] for pruned candidates k, (1 − p0[channel of f]) · q[f, k] for the others

    with q the softmax within either kind of candidates (so 1 for a single candidate of 0 bits).

    pruned    K booleans: which candidates have weights of 0 bits
    channels  the row of `prune` for every filter
    prune     a Gate [channels, 2] over (pruned, kept), the same module in every layer that it ties. Draws of "sampled" are thus shared
    "fixed"   takes this layer's own `choice`, as every gate does
    """

    pruned: Tensor
    index: Tensor

    def __init__(self, pruned: Sequence[bool], channels: Sequence[int], prune: Gate) -> None:
        device = prune.logits.device
        super().__init__(len(pruned), len(channels), device)
        self.columns, self.channels, self.prune = tuple(pruned), tuple(channels), prune
        self.in_order = self.channels == tuple(range(prune.logits.size(0)))
        self.register_buffer("pruned", torch.tensor(self.columns, device=device), persistent=False)
        self.register_buffer("index", torch.tensor(self.channels, device=device), persistent=False)

    def forward(self) -> Tensor:
        if self.mode == "fixed":
            hard = F.one_hot(self.choice, self.logits.size(-1)).to(torch.float32)
            return torch.where(torch.isfinite(hard), hard, self.logits.float() + self.prune.logits[self.index, :1])
        return self.shared(self.prune()) * self.within()

    def shared(self, p: Tensor) -> Tensor:
        """Of every candidate, the probability of its kind [C, K], from `prune`'s p."""
        p = p if self.in_order else p[self.index]
        return torch.where(self.pruned, p[:, :1], p[:, 1:])

    def within(self) -> Tensor:
        """q [C, K]; in "fixed" mode p itself, since layers may then differ in what they prune."""
        if self.mode == "fixed":
            return self()  # type: ignore[no-any-return]
        return _within(self.logits.float() + self.noise, self.temperature, self.mode, self.pruned, sum(self.columns) == 1)


def _within(noisy: Tensor, temperature: Tensor, mode: str, pruned: Tensor, single: bool) -> Tensor:
    """softmax or straight-through draw among the pruned candidates, and among the others; single: one candidate is pruned."""
    kept = _sharpened(noisy.masked_fill(pruned, -math.inf), temperature, mode)
    return kept + (pruned.to(kept.dtype) if single else _sharpened(noisy.masked_fill(~pruned, -math.inf), temperature, mode))


class Constant(nn.Module):
    """The gate of a layer with one candidate: p = 1, no parameters."""

    one: Tensor
    mode = "fixed"

    def __init__(self, rows: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones((1,) if rows is None else (rows, 1), device=device), persistent=False)

    def forward(self) -> Tensor:
        return self.one

    def distribution(self) -> Tensor:
        """[1]."""
        return self.one.reshape(-1)[:1]


def probabilities(members: Sequence[Gate | Constant]) -> list[Tensor]:
    """p of many gates, [1 or C, K] each: what calling them one by one gives, in a few operations for all of the same K, mode and device."""
    alike: dict[tuple[int, str, torch.device, tuple[bool, ...]], list[int]] = {}
    found: list[Tensor | None] = [None] * len(members)
    for i, gate in enumerate(members):
        if isinstance(gate, Constant | FilterGate) or gate.mode == "fixed":
            p = gate()
            found[i] = p if p.dim() == 2 else p.unsqueeze(0)
        else:
            columns = gate.columns if isinstance(gate, TiedGate) else ()
            alike.setdefault((gate.logits.size(-1), gate.mode, gate.logits.device, columns), []).append(i)
    prunes = list(dict.fromkeys(gate.prune for gate in members if isinstance(gate, TiedGate) and gate.mode != "fixed"))
    shared = dict(zip(prunes, probabilities(prunes), strict=True)) if prunes else {}
    for (k, mode, _, columns), picks in alike.items():
        chosen = [gate for gate in (members[i] for i in picks) if isinstance(gate, Gate)]
        logits = [gate.logits.view(-1, k) for gate in chosen]
        noise = torch.cat([gate.noise.view(-1, k) for gate in chosen])
        temperature = torch.cat([gate.temperature.expand(rows.size(0), 1) for gate, rows in zip(chosen, logits, strict=True)])
        noisy = torch.cat(logits).float() + noise
        tied = [gate for gate in chosen if isinstance(gate, TiedGate)]
        if tied:
            within = _within(noisy, temperature, mode, tied[0].pruned, sum(columns) == 1)
            together = within * torch.cat([gate.shared(shared[gate.prune]) for gate in tied])
        else:
            together = _sharpened(noisy, temperature, mode)
        for i, p in zip(picks, together.split([rows.size(0) for rows in logits]), strict=True):
            found[i] = p
    return [p for p in found if p is not None]


def make_gate(candidates: int, rows: int | None = None, device: torch.device | None = None) -> Gate | Constant:
    return Constant(rows, device) if candidates == 1 else Gate(candidates, rows, device)


def gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """The gates that have something to learn, with their names, in the order of the model's modules."""
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module


def set_gates(model: nn.Module, mode: str | None = None, temperature: float | None = None) -> None:
    """Set the mode and the softmax temperature of every gate of a prepared model."""
    if mode is not None and mode not in MODES:
        raise QPruneError(f"unknown gate mode {mode!r}: expected one of {', '.join(MODES)}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise QPruneError(f"temperature: expected a positive number, got {temperature!r}")
    for _, gate in gates(model):
        if mode is not None:
            gate.mode = mode
        if temperature is not None:
            gate.temperature.fill_(temperature)


def sample_gates(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw new Gumbel noise for every gate, in module order, from one generator."""
    for _, gate in gates(model):
        gate.sample(generator)
