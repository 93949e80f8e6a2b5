"""The parts of a unit besides its convolution: normalisation and activation, which follow the choices of the same gate."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.gates import Constant, FilterGate
from qprune.nn.surgery import take_over
from qprune.quantizers import OutputQuantizer


def chosen_rows(t: Tensor, choice: Tensor) -> Tensor:
    """t [K, F, …] → [F, …]: row f of candidate choice[f], with zero gradients for the others. choice [S, F] gives [S·F, …]."""
    filters = torch.arange(t.size(1), device=t.device)
    return t[choice.flatten(), filters.repeat(choice.numel() // t.size(1))]


def sum_branches(y: Tensor, p: Tensor) -> Tensor:
    """Σ_k p[:, k] y[k] for y [K, N, F, H, W], p [F, K]."""
    terms = [branch * share.to(y.dtype).view(-1, 1, 1) for branch, share in zip(y.unbind(0), p.unbind(1), strict=True)]
    return functools.reduce(torch.add, terms)  # one after the other: the result keeps the branches' layout


class _Part:
    """Mixin of a unit's modules besides the convolution: they use its gate without registering it, so that it is stored once."""

    gate: FilterGate | Constant

    def share(self, gate: FilterGate | Constant) -> None:
        self.__dict__["gate"] = gate


class FilterBatchNorm2d(_Part, nn.BatchNorm2d):
    """The normalisation of a unit: nn.BatchNorm2d, or, with own=True, scale, shift and statistics [K, F] per candidate, of which every
    filter uses and updates those of its own.

    last  no activation follows: the relaxation is summed here. In the relaxation every branch is normalised by its own batch's statistics;
          shared running statistics then move towards their mean, weighted by p
    """

    own = False
    last = False

    @classmethod
    def from_float(cls, norm: nn.BatchNorm2d, gate: FilterGate | Constant, candidates: int, own: bool, last: bool) -> FilterBatchNorm2d:
        def setup(layer: FilterBatchNorm2d) -> None:
            layer.share(gate)
            layer.own, layer.last = own, last
            if own:
                layer._give_each(candidates)

        return take_over(cls, norm, setup)

    def _give_each(self, candidates: int) -> None:
        for name, t in [*self._parameters.items(), *self._buffers.items()]:
            if t is None:
                continue
            each = t.detach().expand(candidates, self.num_features).clone()
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(each, requires_grad=t.requires_grad)
            else:
                self._buffers[name] = each

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 5:
            y = self._branches(input)
            return sum_branches(y, self.gate()) if self.last else y
        if not self.own:
            return super().forward(input)
        if self.gate.mode == "sampled":
            p = self.gate()
            choice = p.detach().argmax(1)
            weight, bias = (None if t is None else (t * p.t()).sum(0) for t in (self.weight, self.bias))
        else:
            choice = self._choice()
            weight, bias = (None if t is None else chosen_rows(t, choice) for t in (self.weight, self.bias))
        stats = [None if t is None else chosen_rows(t, choice) for t in (self.running_mean, self.running_var)]
        y, batch = self._normalise(input, weight, bias, *stats)
        if batch is not None and self.running_mean is not None:
            index = (choice, torch.arange(self.num_features, device=choice.device))
            self._follow(index, *batch)
        return y

    def _choice(self) -> Tensor:
        if isinstance(self.gate, FilterGate):
            return self.gate.choice
        return torch.zeros(self.num_features, dtype=torch.int64, device=self.gate.one.device)

    def _branches(self, x: Tensor) -> Tensor:
        k = x.size(0)
        rows = [None if t is None else t.flatten() if self.own else t.repeat(k) for t in (self.weight, self.bias)]
        stats = [None if t is None else t.flatten() if self.own else t.repeat(k) for t in (self.running_mean, self.running_var)]
        y, batch = self._normalise(x.movedim(0, 1).flatten(1, 2), *rows, *stats)
        if batch is not None and self.running_mean is not None:
            mean, var = (t.view(k, -1) for t in batch)
            if not self.own:
                p = self.gate().detach().t().to(mean.dtype)
                mean, var = (p * mean).sum(0), (p * var).sum(0)
            self._follow((slice(None),), mean, var)
        return y.unflatten(1, (k, -1)).movedim(1, 0)

    def _normalise(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x normalised, and the mean and unbiased variance of the batch where those were used."""
        if not self.training and mean is not None:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps), None
        dtype = x.dtype if mean is None else mean.dtype
        batch_mean, batch_var = (torch.zeros(x.size(1), dtype=dtype, device=x.device) for _ in range(2))
        return F.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, self.eps), (batch_mean, batch_var)

    @torch.no_grad()
    def _follow(self, index: Any, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics at `index` towards a batch's: by `momentum`, or to the plain average where that is None."""
        if not self.training or self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        if self.own:
            self.num_batches_tracked[index] += 1
        else:
            self.num_batches_tracked += 1
        count = self.num_batches_tracked[index] if self.own else self.num_batches_tracked
        step: Any = 1.0 / count if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running[index] = running[index] + step * (new - running[index])

    def as_plain(self) -> nn.BatchNorm2d:
        """The nn.BatchNorm2d of the chosen candidates."""
        return self.chosen(self._choice())

    def chosen(self, choice: Tensor) -> nn.BatchNorm2d:
        """The nn.BatchNorm2d of the candidates `choice` [F]."""

        def strip(norm: nn.BatchNorm2d) -> None:
            for name in ("gate", "own", "last"):
                norm.__dict__.pop(name, None)
            if not self.own:
                return
            for name, t in [*norm._parameters.items(), *norm._buffers.items()]:
                if t is not None:
                    row = chosen_rows(t.detach(), choice)
                    row = row.amax() if name == "num_batches_tracked" else row
                    if name in norm._parameters:
                        norm._parameters[name] = nn.Parameter(row, requires_grad=t.requires_grad)
                    else:
                        norm._buffers[name] = row

        return take_over(nn.BatchNorm2d, self, strip)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, t in [*self._parameters.items(), *self._buffers.items()]:
            loaded = state_dict.get(f"{prefix}{name}")
            if self.own and t is not None and isinstance(loaded, Tensor) and loaded.dim() < t.dim():
                state_dict[f"{prefix}{name}"] = loaded.expand(t.shape)  # a float network has it once
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


class FilterActivation(_Part, nn.Module):
    """The activation of a unit: nn.ReLU, or nn.ReLU6 with limit 6, quantized with the bits of every channel's candidate.

    x [N, F, H, W], or the branches [K, N, F, H, W] of the relaxation, which are summed here.
    """

    quantizer: OutputQuantizer
    limit: float | None = None

    @classmethod
    def from_float(
        cls, rectifier: nn.Module, gate: FilterGate | Constant, kind: str, a_bits: tuple[int, ...], own: bool, device: torch.device | None
    ) -> FilterActivation:
        def setup(layer: FilterActivation) -> None:
            layer.__dict__.pop("inplace", None)
            layer.share(gate)
            layer.limit = 6.0 if isinstance(rectifier, nn.ReLU6) else None
            layer.quantizer = OutputQuantizer(kind, a_bits, own).to(device)

        return take_over(cls, rectifier, setup)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.limit is None else input.clamp(max=self.limit)
        p = self.gate()
        if x.dim() == 4:
            return self.quantizer(x, p)  # type: ignore[no-any-return]
        if self.quantizer.kind == "uniq":  # its statistics are those of one branch
            return sum_branches(torch.stack([self.quantizer.candidate(branch, k) for k, branch in enumerate(x)]), p)
        own_candidate = torch.eye(x.size(0), device=x.device).repeat_interleave(x.size(2), 0)
        y = self.quantizer(x.movedim(0, 1).flatten(1, 2), own_candidate)
        return sum_branches(y.unflatten(1, (x.size(0), -1)).movedim(1, 0), p)

    def as_plain(self) -> nn.Module:
        """The rectifier that this module extends."""
        return nn.ReLU() if self.limit is None else nn.ReLU6()
