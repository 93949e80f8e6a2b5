"""Units whose filters choose their own candidates: convolution, normalisation, activation (Zur et al., 1904.09872).

A candidate is a pair (weight bits, bits of the activation that the filter produces). The original computes every filter with a
convolution, a normalisation and an activation of its own. These layers are one dense convolution with one weight row, one normalisation and
one activation quantizer per channel; the results are the same.

From the original: what a unit is, candidates with parameters of their own (shared_weights=False), running statistics that move for the
chosen candidates only, and shortcuts without an activation, whose candidates differ in their weights only. Ours: one weight and one
normalisation for all candidates (the default), clips that are learned ("pact"), and other weight quantizers than NICE and UNIQ. A bias,
which the original's convolutions lack, is one per filter in either case. The input's gradient is taken with the quantized weight.

What the gate's mode means: "fixed" and "sampled": every filter has one candidate. "relaxed": the layer's p weighs branches,
y = Σ_k p_k A_k(relu(BN_k(conv_k(x)) + r)). Reconstruction: DARTS's sum over operations, as the first version of the authors' program had
it, over candidates as the last version has them. The K branches come from one convolution with K·F filters and are carried as
[K, N, F, H, W], to which a residual r [N, F, H, W] can be added, up to the last module of the unit, which sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.constants import constant
from qprune.convolution import split_for_groups
from qprune.errors import PolicyMismatchError
from qprune.gates import Constant, FilterGate
from qprune.nn.mixing import QuantizedLayer, check_input
from qprune.nn.surgery import take_over
from qprune.nn.unitparts import chosen_rows, sum_branches
from qprune.quantizers import InputQuantizer, make_weight_quantizer
from qprune.space import FLOAT, SearchSpace


def unit_candidates(space: SearchSpace, produces: bool) -> tuple[tuple[int, int], ...]:
    """The candidates of a unit; without an activation those of equal weight bits are one, (w, 32)."""
    return space.candidates if produces else tuple(dict.fromkeys((w, FLOAT) for w, _ in space.candidates))


class FilterConv2d(QuantizedLayer, nn.Conv2d):
    """The convolution of a unit. Input [N, C, H, W].

    Takes nn.Conv2d's arguments, then the SearchSpace, `produces` (the unit has an activation) and `input_bits` (bits at which it quantizes
    its own input, 32 for none). `weight` is nn.Conv2d's with shared weights, else [K·F, C, kh, kw], the weights of the first candidate
    first; a float state_dict loads into either.

    candidates       ordered pairs (weight bits, bits of the activation that a filter produces); 32 in a unit without activation
    gate             FilterGate over `candidates`
    alone            there is neither normalisation nor activation behind it: the relaxation is summed here
    weight_quantizer over the distinct weight bits (shared weights) or one entry per candidate
    input_quantizer  None where the input is quantized by its producer
    """

    space: SearchSpace
    candidates: tuple[tuple[int, int], ...]
    produces: bool
    input_bits: int
    gate: FilterGate | Constant
    weight_quantizer: Any
    input_quantizer: InputQuantizer | None  # type: ignore[assignment]

    def __init__(
        self, *args: Any, space: SearchSpace, produces: bool = True, input_bits: int = FLOAT, alone: bool = False, **layer: Any
    ) -> None:
        nn.Conv2d.__init__(self, *args, **layer)
        self.setup_unit(space, produces, input_bits, alone)

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, space: SearchSpace, produces: bool = True, input_bits: int = FLOAT, alone: bool = False
    ) -> FilterConv2d:
        """The unit's convolution with the parameters, buffers, hooks, device, dtype and mode of `conv`."""
        return take_over(cls, conv, lambda layer: layer.setup_unit(space, produces, input_bits, alone))

    def setup_unit(self, space: SearchSpace, produces: bool, input_bits: int, alone: bool) -> None:
        filters, device = self.weight.size(0), self.weight.device
        self.space, self.produces, self.input_bits, self.alone = space, produces, input_bits, alone
        self.candidates = unit_candidates(space, produces)
        w_bits = tuple(w for w, _ in self.candidates)
        self.own = not space.shared_weights
        self.gate = make_filter_gate(self.candidates, filters, space.granularity == "layer", device)
        distinct = w_bits if self.own else tuple(dict.fromkeys(w_bits))
        self.picks = list(range(len(w_bits))) if self.own else [distinct.index(w) for w in w_bits]
        self.weight_quantizer = make_weight_quantizer(space.weight_quantizer, distinct, filters if space.scales == "filter" else 1, device)
        self.weight_quantizer.start(self.weight)
        kind = space.input_quantizer if space.input_quantizer in ("pact", "lsq+") else "pact"
        self.input_quantizer = None if input_bits == FLOAT else InputQuantizer(kind, (input_bits,), device)
        if self.own:
            each = torch.cat([self.weight.detach()] * len(self.candidates))
            self.weight = nn.Parameter(each, requires_grad=self.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, (4,), self.in_channels, -3)
        x = self.quantized_input(input)
        if self.gate.mode != "relaxed":
            return self._conv_forward(x, self.mixed_weight(self.gate()), self.bias)
        y = self._branches(x)
        return sum_branches(y, self.gate()) if self.alone else y

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x, torch.ones(1, device=x.device))

    def mixed_weight(self, p: Tensor) -> Tensor:
        """The weight [F, C, kh, kw] of one-hot p [F, K]."""
        if not self.own:
            return self.weight_quantizer(self.weight, self._over_weights(p))  # type: ignore[no-any-return]
        if self.gate.mode == "fixed":
            return self.weight_quantizer(self.chosen_weight(), p)  # type: ignore[no-any-return]
        each = [self.weight_quantizer(weight, p * self._one_hot(k)) for k, weight in enumerate(self.each_weight())]
        return torch.stack(each).sum(0)

    def candidate_weights(self) -> Tensor:
        """Q_k(W_k) of all candidates, [K, F, C, kh, kw]."""
        quantized: dict[int, Tensor] = {}
        for column, weight in zip(self.picks, self.each_weight(), strict=True):
            if column not in quantized:
                quantized[column] = self.weight_quantizer(weight, self._one_hot(column))
        return torch.stack([quantized[column] for column in self.picks])

    def chosen_weight(self, choice: Tensor | None = None) -> Tensor:
        """The float weight [F, C, kh, kw] of the filters' candidates: those of `choice` [F], or of the gate."""
        if not self.own:
            return self.weight
        if choice is None:
            if isinstance(self.gate, Constant):
                return self.weight
            choice = self.gate.choice
        return chosen_rows(self.weight.unflatten(0, (len(self.candidates), -1)), choice)

    def each_weight(self) -> tuple[Tensor, ...]:
        """The float weight [F, C, kh, kw] of every candidate."""
        k = len(self.candidates)
        return self.weight.chunk(k) if self.own else (self.weight,) * k

    def choice_for(self, w_bits: int | Sequence[int], out_bits: int | Sequence[int] | None = None) -> Tensor:
        """The candidate of every filter [F] int64 with these bits. Raises PolicyMismatchError where there is none."""
        filters = self.out_channels
        w, a = ((b,) * filters if b is None or isinstance(b, int) else tuple(b) for b in (w_bits, out_bits))
        for pair in set(pairs := [(wf, FLOAT if af is None else af) for wf, af in zip(w, a, strict=True)]):
            if pair not in self.candidates:
                raise PolicyMismatchError(f"layer {self.layer_name}: {pair} is not a candidate; it has {self.candidates}")
        return torch.tensor([self.candidates.index(pair) for pair in pairs], device=self.weight.device)

    @torch.no_grad()
    def copy_ranges(self, target: nn.Module) -> None:
        """Give a weight quantizer with one candidate per filter the ranges of the chosen candidates. With shared weights there is one range
        per weight width, which it has already."""
        source, there = getattr(self.weight_quantizer, "log_range", None), getattr(target, "log_range", None)
        if self.own and isinstance(self.gate, FilterGate) and source is not None and there is not None and len(source) > 1:
            there.copy_(source.gather(1, self.gate.choice.unsqueeze(1)).expand_as(there))

    def as_plain(self) -> nn.Conv2d:
        """The nn.Conv2d that this layer extends; with weights of their own, that of the chosen candidates."""

        def strip(conv: nn.Conv2d) -> None:
            for name in ("gate", "weight_quantizer", "input_quantizer"):
                conv._modules.pop(name, None)
            for name in ("space", "produces", "input_bits", "alone", "candidates", "own", "picks", "layer_name", "input_quantizer"):
                conv.__dict__.pop(name, None)
            if self.own:
                conv.weight = nn.Parameter(self.chosen_weight().detach().clone(), requires_grad=self.weight.requires_grad)

        return take_over(nn.Conv2d, self, strip)

    def _branches(self, x: Tensor) -> Tensor:
        k, g = len(self.candidates), self.groups
        weights = self.candidate_weights().unflatten(1, (g, -1)).transpose(0, 1)  # the filters of a group must be neighbours
        bias = None if self.bias is None else self.bias.view(g, 1, -1).expand(-1, k, -1).flatten()
        y = split_for_groups(self._conv_forward(x, weights.flatten(0, 2), bias), g, k)
        return y.unflatten(1, (k, -1)).movedim(1, 0)

    def _over_weights(self, p: Tensor) -> Tensor:
        """p over candidates → over the quantizer's weight bits."""
        columns = self.weight_quantizer.bits
        if len(columns) == len(self.candidates):
            return p
        return torch.stack([torch.stack([p[:, k] for k, c in enumerate(self.picks) if c == j]).sum(0) for j in range(len(columns))], 1)

    def _one_hot(self, column: int) -> Tensor:
        hot = tuple(float(c == column) for c in range(len(self.weight_quantizer.bits)))
        return constant(hot, torch.float32, self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if self.own and isinstance(loaded, Tensor) and loaded.shape == self.each_weight()[0].shape:
            state_dict[f"{prefix}weight"] = torch.cat([loaded] * len(self.candidates))
        nn.Conv2d._load_from_state_dict(self, state_dict, prefix, *args)
        if f"{prefix}weight" not in state_dict:
            return
        if not any(key.startswith(f"{prefix}weight_quantizer.") for key in state_dict):
            self.weight_quantizer.start(self.each_weight()[0])
        if self.input_quantizer is not None and not any(key.startswith(f"{prefix}input_quantizer.") for key in state_dict):
            self.input_quantizer.restart()

    def extra_repr(self) -> str:
        own = ", own weights" if self.own else ""
        inputs = "" if self.input_bits == FLOAT else f", input_bits={self.input_bits}"
        return f"{super().extra_repr()}, candidates={self.candidates}{inputs}{own}"


def make_filter_gate(
    candidates: Sequence[tuple[int, int]], filters: int, together: bool, device: torch.device | None
) -> FilterGate | Constant:
    return Constant(filters, device) if len(candidates) == 1 else FilterGate(candidates, filters, together, device)
