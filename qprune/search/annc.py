"""ANNC: Yang, Gui, Zhu and Liu, "Automatic Neural Network Compression by Sparsity-Quantization Joint Learning" (CVPR 2020, 1910.05897).

minimise loss(W) subject to Σ b_l ‖W_l‖₀ ≤ S over layers l: the weights W carry the sparsity, a duplicate V the quantization, with W = V in
an augmented Lagrangian with scaled dual U. As the paper's programs do it:

    every batch:          g = ∇ loss(W) + decay · W;  W ← momentum step;  W ← (W + ηρ (V − U)) / (1 + ηρ),  η the learning rate
    every `interval`:     W ← P_sparse(W; bits);  V, bits ← P_quant(W + U; non-zeros);  U ← U + W − V
    in the end:           the non-zeros of every layer of W are clustered to 2^bits shared values

P_sparse (qprune.search.sparsity) is a knapsack over single weights, P_quant one over the layers' bits (qprune.search.bitplan) with k-means
as the quantizer (qprune.codebooks). Momentum buffers are not touched by projections; between them W may become dense again.

Ours: a least number of weights per layer; whole filters as items (granularity="filter"); layers that stay float; quantized inputs, which
enter with the result; Nesterov's momentum and gradient clipping as options; the share of the distillation's loss; and the starting bits as
an option of their own, where the programs take the integer part of the bits that the budget is given by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.codebooks import WIDTHS, ZERO, Codebook, codebooks
from qprune.cost import geometry_of
from qprune.errors import BudgetError, InputError
from qprune.geometry import float_twin
from qprune.nn.codebook import codebook_layers, to_codebook
from qprune.nn.surgery import copy_model, replace_modules
from qprune.policy import Policy
from qprune.prepare import weight_parameters
from qprune.record import attach, record_of
from qprune.search.bitplan import CODEBOOK_ENTRY_BITS, plan_bits
from qprune.search.compressible import check_size, compressible_layers, float_bits, output_layers
from qprune.search.distill import Distillation
from qprune.search.method import Closure, Method, StepResult
from qprune.search.sparsity import Kept, keep_filters, keep_weights
from qprune.space import FLOAT, IMAGE_BITS, PRUNED, check_bits
from qprune.stored import layer_bits
from qprune.wrappers import unwrap

GRANULARITIES = ("weight", "filter")


class Annc(Method):
    """coupling     ρ, the weight of ‖W − V + U‖² (the paper: 0.05 for LeNet-5 on MNIST, 1e-3 for AlexNet). W follows V at a rate of ηρ
                 per batch: what counts is the sum of ηρ from one projection to the next
    bits         of every layer's weights until the first P_quant, or {layer: bits}; the programs: the integer part of the budget's bits
    least_bits, most_bits   that P_quant chooses from
    interval     batches between projections; None: at the end of every epoch of `fit` (who steps by hand calls `end_epoch`)
    project_first  project after the very first batch too, as for a network that is trained already
    granularity  "weight": single weights are pruned; "filter": whole filters, but none of a layer that gives the network's output
    at_least     weights, or filters, of every layer that stay (ours; the programs: 0). Whole filters compete by their energy per bit, which
                 can leave a layer of small weights with too few
    exact        P_quant by a mixed-integer programme, and P_sparse too for filters; False: the paper's greedy choice
    charge_codebooks  the budget holds the codebooks too, 32 bits per value
    linear       equidistant values in place of k-means (ours)
    freeze_after the bits stay as they are after so many projections; None: never
    keep         names, or fnmatch patterns, of layers that stay float: their weights cost 32 bits each
    keep_edges   the first and the last layer stay float
    warmup       share of the planned steps over which the learning rate rises
    nesterov     momentum by Nesterov; the programs: plain
    clip_grad    largest norm of all weights' gradients together; None: no limit
    temperature  of distillation from the network as it was at the start, or from `teacher`; None: without
    teacher, teacher_share  another network for that, and its share of the loss
    a_bits       of the result's inputs (the first layer's: 8), from 1 to 8, or 32: float

    The budget is one of size: bits of the weights that remain, no index, no codebook (unless charged), no bias. `network` gives the
    result, `policy` its bits with 0 for filters that have no weight left, `chosen` lets the model compute with the result's weights.

    Raises InputError for other options than these, a model that was prepared, layers that share a weight, and a recorder: projections are
    made on the host. BudgetError for a budget of anything but size, InfeasibleBudgetError for one below what `at_least` needs at the first
    bits.
    """

    name = "annc"

    def __init__(
        self,
        *args: Any,
        coupling: float = 0.05,
        bits: int | Mapping[str, int] = 3,
        least_bits: int = 1,
        most_bits: int = 8,
        interval: int | None = None,
        project_first: bool = True,
        granularity: str = "weight",
        at_least: int = 1,
        exact: bool = False,
        charge_codebooks: bool = False,
        linear: bool = False,
        freeze_after: int | None = None,
        keep: Sequence[str] = (),
        keep_edges: bool = False,
        warmup: float = 0.0,
        nesterov: bool = False,
        clip_grad: float | None = None,
        temperature: float | None = None,
        teacher: nn.Module | None = None,
        teacher_share: float = 0.5,
        a_bits: int = FLOAT,
    ) -> None:
        super().__init__(*args)
        if self.recorder is not None:
            raise InputError("annc: projections are made on the host and cannot be recorded; leave out cuda_graph=True")
        if granularity not in GRANULARITIES:
            raise InputError(f"annc: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if not 0 < coupling < float("inf"):
            raise InputError(f"annc: coupling must be a positive number, got {coupling!r}")
        if not (least_bits in WIDTHS and most_bits in WIDTHS and least_bits <= most_bits):
            raise InputError(f"annc: expected 1 <= least_bits <= most_bits <= 8, got {least_bits} and {most_bits}")
        if interval is not None and interval < 1:
            raise InputError(f"annc: interval must be at least 1 batch, or None for an epoch, got {interval}")
        if not 0 <= warmup < 1 or (warmup and self.optimizers.total is None):
            raise InputError(f"annc: warmup is a share of the planned steps, from 0 to below 1, and needs Search(steps=…); got {warmup}")
        self.coupling, self.interval, self.project_first = coupling, interval, project_first
        if at_least < 0:
            raise InputError(f"annc: at_least must not be negative, got {at_least}")
        self.granularity, self.exact, self.at_least = granularity, exact, at_least
        self.widths, self.charge_codebooks, self.linear = range(least_bits, most_bits + 1), charge_codebooks, linear
        self.freeze_after, self.warmup, self.clip_grad = freeze_after, warmup, clip_grad
        (self.a_bits,) = check_bits("a_bits", (a_bits,))
        if a_bits == PRUNED:
            raise InputError("annc: a_bits=0 would leave nothing of the inputs; expected 1 to 8, or 32 for float")
        self.layers = compressible_layers(self.model, keep, keep_edges)
        self.whole = output_layers(self.model) & set(self.layers) if granularity == "filter" else set()
        self.bits = self._start(bits)
        self.limit = self._limit(self.constraint.limits["size_bits"])
        self.weights = {name: layer.weight for name, layer in self.layers.items()}
        self.duplicate = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.dual = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.kept = {name: weight.numel() for name, weight in self.weights.items()}
        self.projections = 0
        for group in self.optimizers.weights.param_groups:
            group["nesterov"] = nesterov
        self._own_teacher = temperature is not None and teacher is None
        self.distillation: Distillation | None = None
        if temperature is not None:
            self.distillation = Distillation(teacher or copy_model(unwrap(self.model)), temperature, teacher_share)
        elif teacher is not None:
            raise InputError("annc: a teacher needs a temperature, for example temperature=4")

    @classmethod
    def limits(cls, model: nn.Module, budget: Budget, convention: str) -> dict[str, float]:
        """The budget as bits of all weights: a share is one of 32 bits per weight, "w4a4" stands for 4 bits per weight."""
        others = set(budget.amounts) - {"size"}
        if others:
            raise BudgetError(f"annc: prunes and shares weights for size, got a budget of {', '.join(sorted(others))}; use size='1%'")
        return budget.limits(geometry_of(model))

    @classmethod
    def check(cls, model: nn.Module, budget: Budget, convention: str) -> None:
        """Raise InfeasibleBudgetError if one bit per layer is too much. What options need besides is checked by the constructor."""
        limit, layers = cls.limits(model, budget, convention)["size_bits"], compressible_layers(model, (), False)
        check_size(float_bits(model, layers) + len(layers), limit)

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """One update of the weights, and what is due after it. arch_closure is not used. Reported are the size at the last projection over
        the budget, and ρ."""
        self._schedule()
        result = self.result(self.update(closure, batch))
        due = self.steps % self.interval == 0 if self.interval is not None else False
        if due or (self.project_first and self.steps == 1):
            self.project()
        return result

    def end_epoch(self) -> None:
        if self.interval is None:
            self.project()

    def update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """The step of the optimizer, and the proximal step of ρ/2 ‖W − V + U‖²."""
        self.optimizers.zero_grad()
        loss = self.task_loss(self.distillation.wrap(closure) if self.distillation is not None else closure, batch)
        self.backward(loss)
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(weight_parameters(self.model), self.clip_grad)
        self.optimizers.step_weights()
        strength = self.optimizers.weights.param_groups[0]["lr"] * self.coupling
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.add_(self.duplicate[name] - self.dual[name], alpha=strength).div_(1 + strength)
        measured = loss.new_tensor([self.size / self.limit, self.coupling], dtype=torch.float64)
        return torch.cat([loss.detach().double().view(1), measured])

    @property
    def size(self) -> int:
        """Σ bits · non-zeros at the last projection; before the first of all weights."""
        return sum(self.bits[name] * kept for name, kept in self.kept.items())

    @torch.no_grad()
    def project(self) -> None:
        """The two projections and the step of the dual, in the order above."""
        kept = self._sparse(self.limit)
        for name, weight in self.weights.items():
            weight.mul_(kept.masks[name])
        self.kept = kept.nnz
        self.duplicate = self._quantized({name: weight + self.dual[name] for name, weight in self.weights.items()})
        for name, weight in self.weights.items():
            self.dual[name] += weight - self.duplicate[name]
        self.projections += 1

    def _sparse(self, limit: float) -> Kept:
        """P_sparse of the present weights; masks are like the weights, whatever the granularity."""
        limit -= sum(CODEBOOK_ENTRY_BITS * 2**bits for bits in self.bits.values()) if self.charge_codebooks else 0
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        if self.granularity == "weight":
            return keep_weights(weights, self.bits, limit, self.at_least)
        whole = {name: weights.pop(name) for name in self.layers if name in self.whole}
        limit -= sum(self.bits[name] * w.numel() for name, w in whole.items())
        kept = keep_filters(weights, self.bits, limit, self.at_least, self.exact)
        masks = {name: kept.masks[name].view(-1, *[1] * (w.dim() - 1)).expand_as(w) for name, w in weights.items()}
        masks |= {name: torch.ones_like(w, dtype=torch.bool) for name, w in whole.items()}
        nnz = kept.nnz | {name: w.numel() for name, w in whole.items()}
        return Kept(masks, nnz, sum(self.bits[name] * count for name, count in nnz.items()))

    def _quantized(self, shifted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P_quant of W + U: sets the bits, unless they are frozen, and returns V."""
        frozen = self.freeze_after is not None and self.projections >= self.freeze_after
        books = codebooks(shifted, sorted(set(self.bits.values())) if frozen else self.widths, linear=self.linear)
        if not frozen:
            errors = {name: {bits: book.error for bits, book in of_layer.items()} for name, of_layer in books.items()}
            method: Literal["greedy", "exact"] = "exact" if self.exact else "greedy"
            self.bits = plan_bits(errors, self.kept, self.limit, self.charge_codebooks, method).bits
        return {name: books[name][self.bits[name]].quantize(z) for name, z in shifted.items()}

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """The weights of `network`."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        try:
            with torch.no_grad():
                for name, (mask, book) in self._compressed(self.limit).items():
                    self.weights[name].copy_(book.quantize(before[name]) * mask)
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self.weights[name].copy_(weight)

    def network(self, budget: Budget | None = None) -> nn.Module:
        """A copy of the model with CodebookConv2d and CodebookLinear layers, whose size is within the budget (None: the search's own).

        Its latent weights are those of the search in the masks, to be fine-tuned (see qprune.nn.codebook). With a_bits, inputs are
        calibrated by the first training batch, or by `qprune.calibrate`.
        """
        limit = self.limit if budget is None else self._limit(self.limits(self.model, budget, self.convention)["size_bits"])
        final = copy_model(unwrap(self.model))
        modules = dict(final.named_modules())
        swaps: dict[nn.Module, nn.Module] = {}
        a_bits = self.a_bits_of_layers()
        for name, (mask, book) in self._compressed(limit).items():
            layer = modules[name]
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            swaps[layer] = made = to_codebook(layer, mask, book.values, a_bits[name], self.linear)
            made.layer_name = name
        final = replace_modules(final, swaps)
        record = record_of(self.model)
        if record is not None:
            attach(final, record)
        return final

    def a_bits_of_layers(self) -> dict[str, int]:
        """Bits of the inputs of the result's layers: `a_bits`, and 8 for the network's first layer, if inputs are quantized at all."""
        first = next(iter(geometry_of(self.model).layers))
        return {name: IMAGE_BITS if self.a_bits != FLOAT and name == first else self.a_bits for name in self.layers}

    def policy(self, budget: Budget) -> Policy:
        """The bits of `network`; filters without weights are at 0 bits and can be removed. A policy counts every weight of the others: its
        size is above that of the network unless whole filters are pruned."""
        bits = {name: layer_bits(layer) for name, layer in codebook_layers(self.network(budget))}
        return Policy(bits, geometry_of(self.model))

    @torch.no_grad()
    def _compressed(self, limit: float) -> dict[str, tuple[Tensor, Codebook]]:
        """Every layer's mask within the limit, and its codebook."""
        kept, found = self._sparse(limit), {}
        for name, weight in self.weights.items():
            w, mask = weight.detach(), kept.masks[name]
            if self.granularity == "weight":
                mask = mask & (w.abs() >= ZERO)
            found[name] = (mask, codebooks({name: w[mask]}, (self.bits[name],), False, self.linear)[name][self.bits[name]])
        return found

    def _schedule(self) -> None:
        self.optimizers.schedule(self.steps)
        if self.warmup and self.optimizers.total is not None:
            factor = min(1.0, (self.steps + 1) / (self.warmup * self.optimizers.total + 1))
            for group in self.optimizers.weights.param_groups:
                group["lr"] *= factor

    def _start(self, bits: int | Mapping[str, int]) -> dict[str, int]:
        given = {name: bits if isinstance(bits, int) else bits.get(name, 0) for name in self.layers}
        for name, b in given.items():
            if isinstance(b, bool) or b not in self.widths:
                raise InputError(f"annc: layer {name} starts at {b} bits; expected {self.widths[0]} to {self.widths[-1]}")
        return given

    def _limit(self, total: float) -> float:
        """What of the budget is left for the layers that are compressed."""
        apart = float_bits(self.model, self.layers)
        least = 0
        for name, layer in self.layers.items():
            items = min(self.at_least, layer.weight.numel())
            if self.granularity == "filter":
                filters = len(layer.weight)
                items = layer.weight[0].numel() * (filters if name in self.whole else min(self.at_least, filters))
            least += self.bits[name] * items + (CODEBOOK_ENTRY_BITS * 2 ** self.bits[name] if self.charge_codebooks else 0)
        check_size(apart + least, total)
        return total - apart

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """expected: bits per layer; kept: share of weights that the last projection left; distance: ‖W − V‖ / ‖W‖ of all layers."""
        gap = sum(float((w - self.duplicate[name]).double().square().sum()) for name, w in self.weights.items())
        norm = sum(float(w.double().square().sum()) for w in self.weights.values())
        return {
            "entropy": 0.0,
            "expected": {name: {"w_bits": float(bits), "a_bits": float(self.a_bits)} for name, bits in self.bits.items()},
            "kept": {name: kept / self.weights[name].numel() for name, kept in self.kept.items()},
            "distance": (gap / norm) ** 0.5 if norm else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "duplicate": {name: value.clone() for name, value in self.duplicate.items()},
            "dual": {name: value.clone() for name, value in self.dual.items()},
            "bits": dict(self.bits),
            "kept": dict(self.kept),
            "projections": self.projections,
            "teacher": self.distillation.teacher.state_dict() if self.distillation is not None and self._own_teacher else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in self.weights:
            self.duplicate[name].copy_(state["duplicate"][name])
            self.dual[name].copy_(state["dual"][name])
        self.bits, self.kept, self.projections = dict(state["bits"]), dict(state["kept"]), state["projections"]
        if self.distillation is not None and self._own_teacher:
            self.distillation.teacher.load_state_dict(state["teacher"])


def continued(network: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """(float network, bits): the start of a search for a smaller budget from the result of another, V = W and U = 0.

        net, bits = continued(search.method.network())
        search = Search(net, Budget(size="0.2%"), "annc", bits=bits)

    Very high ratios are reached by chains of such searches. Weights are the latent ones, which are 0 where they were pruned but may come
    back.
    """
    return float_twin(network), {name: layer.w_bits for name, layer in codebook_layers(network)}
