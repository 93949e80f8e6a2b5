"""Single-path bit sharing: Liu, Zhuang, Chen, Shen, Cai and Tan, "Single-path Bit Sharing for Automatic Loss-aware Model Compression"
(2101.04935; IEEE TPAMI 45(10), 2023).

    model = prepare(net, SearchSpace(w_bits=(0, 2, 4, 8), a_bits=(2, 4, 8)), rules, x)      # 0: filters may be pruned
    search = Search(model, Budget(bops="w3a3"), method="sbs")

From the paper: nested candidates, so that the wider quantizer is the narrower one plus residuals; a gate per residual and per group of
filters, open while a statistic is above a learned threshold (qprune.nn.bitgates); thresholds of 0 at the start, kept at 0 or above after
every step, without weight decay, at the weights' rate and with their momentum; thresholds of weights learn in even steps, those of inputs
in odd ones; the loss CE + λ log R with the bit operations R of the gated network; weights, clips and thresholds learn together on one
stream of data. R = Σ_l k² C_in C_out H W b_w b_a with the soft counts C = Σ f of filters and b = b_1 + Σ_k G_k (b_k − b_{k−1}) of bits,
G_k = g_2 … g_k: what `qprune.cost` gives for p, since b = Σ_k p_k b_k. Residuals are those of ungated sums, as in the paper's formula; its
program subtracts the gated sum, which has the same value but another gradient for all gates but the last (derived).

Ours: λ is found by dual ascent on log(R / budget) (lmbda: a constant, as in the paper); clips learn by Adam, as logarithms; filters are
gated where their channel is read (qprune.nn.nested); the policy meets the budget exactly (qprune.search.sbs_policy). Filter thresholds
learn in every step, which the paper leaves open. The cost of a depthwise layer counts its gate twice, as filter and as channel: right in
value, doubled in that layer's gradient. Gates in a residual's statistic are constants.

The policy is converted like any other: the stored weight is then w − μ, so that plain "dorefa" quantizers with the range 2 v σ compute the
same; fine-tuning no longer normalises it. Its pruned filters are gone, as their gates have it here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.accumulation import calibrate_first
from qprune.budget import Budget
from qprune.cost import cost, geometry_of
from qprune.errors import InputError
from qprune.nn.bitgates import BitGate, PruningGate
from qprune.nn.nested import nest
from qprune.nn.premix import Premix
from qprune.nn.surgery import copy_model
from qprune.policy import Policy
from qprune.prepare import quantizer_parameters, weight_parameters
from qprune.search.method import Closure, Method, StepResult
from qprune.search.optimizers import Optimizers
from qprune.search.residuals import of_the_batch
from qprune.search.sbs_policy import Allocation, gate_probabilities, gated_chains, nested_layers
from qprune.wrappers import unwrap

MODES = ("joint", "quantization", "pruning", "two-stage")
_ALL = 1 - 1e-9


class Sbs(Method):
    """mode           "joint": bits, and filters where w_bits has 0; "quantization": bits alone; "pruning": filters alone, at the widest
                   bits; "two-stage": filters in the first `switch` steps, then bits
    switch         of mode "two-stage"
    lmbda          λ; None: found for the budget
    alternate      False: all thresholds learn in every step
    threshold_rate rate of the thresholds, as a multiple of the weights'
    clips, group_size, max_pruning, per_group    see `qprune.nn.nested.nest`

    The prepared model's searched layers become nested ones in place. A model inside DistributedDataParallel or torch.compile must be
    nested before it is wrapped. Raises SpaceError for candidates that cannot be nested, InputError for options that cannot be, and
    InfeasibleBudgetError for a budget that no policy meets.
    """

    name = "sbs"
    default_bits = (2, 4, 8)

    def __init__(
        self,
        *args: Any,
        mode: str = "joint",
        switch: int | None = None,
        lmbda: float | None = None,
        alternate: bool = True,
        threshold_rate: float = 1.0,
        clips: str = "one",
        group_size: int = 4,
        max_pruning: float = 0.5,
        per_group: bool = False,
    ) -> None:
        super().__init__(*args)
        if mode not in MODES:
            raise InputError(f"sbs: unknown mode {mode!r}; expected one of {', '.join(MODES)}")
        if (mode == "two-stage") != (switch is not None) or (switch is not None and switch < 1):
            raise InputError(f"sbs: mode 'two-stage' takes switch, the number of steps before bits are searched; got {mode!r} and {switch}")
        if lmbda is not None and not lmbda >= 0:
            raise InputError(f"sbs: lmbda must be at least 0, got {lmbda}")
        inner = unwrap(self.model)
        if inner is not self.model and not nested_layers(inner):
            raise InputError("sbs: a wrapped model's layers cannot be replaced; call qprune.nn.nested.nest on it before it is wrapped")
        nest(inner, geometry_of(inner), clips, group_size, max_pruning, per_group, prune=mode != "quantization")
        self.premix = Premix(inner)
        self.layers, self.chains = nested_layers(inner), gated_chains(inner)
        if not self.layers:
            raise InputError("sbs: no layer has several candidates: there is nothing to search")
        if mode in ("pruning", "two-stage") and not self.chains:
            raise InputError(f"sbs: mode {mode!r} needs 0 in w_bits of layers whose filters can be pruned, and there are none")
        self.mode, self.switch, self.lmbda, self.alternate, self.threshold_rate = mode, switch, lmbda, alternate, threshold_rate
        self.weight_gates = [layer.weight_gate.bits for layer in self.layers.values() if isinstance(layer.weight_gate.bits, BitGate)]
        self.input_gates = [layer.input_gate for layer in self.layers.values() if isinstance(layer.input_gate, BitGate)]
        adopt(self.optimizers, inner)
        Allocation(inner, self.constraint.limits, self.convention, mode == "pruning").check()
        self._enter_stage()
        if lmbda is not None:
            self.constraint.multipliers = dict.fromkeys(self.constraint.limits, lmbda)

    @classmethod
    def check(cls, model: nn.Module, budget: Budget, convention: str) -> None:
        """Raise InfeasibleBudgetError if no policy is within the budget, even one that keeps a single group of every layer's filters, and
        SpaceError for candidates that cannot be nested."""
        twin = unwrap(model)
        if not nested_layers(twin):
            twin = copy_model(twin)
            nest(twin, geometry_of(twin), group_size=1, max_pruning=_ALL)
        Allocation(twin, cls.limits(model, budget, convention), convention).check()

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """One update of weights, clips and thresholds on the same batch. arch_closure is not used."""
        self.optimizers.schedule(self.steps)
        self._enter_stage()
        updates = (self.weight_gate_update, self.input_gate_update) if self.alternate else (self.joint_update,)
        return self.result(self.run(updates[self.steps % len(updates)], closure, batch))

    def weight_gate_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """The thresholds of inputs stay."""
        return self._update(closure, batch, self.input_gates)

    def input_gate_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """The thresholds of weights stay."""
        return self._update(closure, batch, self.weight_gates)

    def joint_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """All thresholds learn."""
        return self._update(closure, batch, ())

    def _update(self, closure: Closure, batch: Sequence[Tensor], resting: Sequence[BitGate]) -> Tensor:
        self.optimizers.zero_grad()
        loss = self.task_loss(closure, batch)
        slack = self.constraint.slack(self.expected_cost())
        penalty = self.constraint.penalty(slack) if self.lmbda is None else self.lmbda * slack.sum()
        self.backward(loss + penalty)
        for gate in (*resting, *self._held()):
            gate.thresholds.grad = None
        learning = [p.grad for p in self._thresholds() if p.grad is not None]
        if learning and self.threshold_rate != 1:
            torch._foreach_mul_(learning, self.threshold_rate)
        self.optimizers.step_weights()
        self._clamp()
        if self.lmbda is None:
            self.constraint.update(slack)
        return self.values(loss, slack)

    def task_loss(self, closure: Closure, batch: Sequence[Tensor] = (), backward: Callable[[Tensor], None] | None = None) -> Tensor:
        """As for every method; in parts, the gates decide by the residuals of the whole batch."""
        if self.accumulate == 1:
            return super().task_loss(closure, batch, backward)
        forward = functools.partial(closure, self.model)
        calibrate_first(self.model, forward, batch)
        with of_the_batch(self.model, self.input_gates, forward, batch, self.accumulate) as begin:

            def begun(model: nn.Module, *part: Tensor) -> Tensor:
                begin()
                return closure(model, *part)

            return super().task_loss(begun, batch, backward)

    def _thresholds(self) -> list[nn.Parameter]:
        gates: list[BitGate | PruningGate] = [*self.weight_gates, *self.input_gates, *(chain.pruning.gate for chain in self.chains)]
        return [gate.thresholds for gate in gates]

    def _held(self) -> list[BitGate | PruningGate]:
        """The gates that do not learn in this stage."""
        if self.mode == "pruning" or self.first_stage:
            return [*self.weight_gates, *self.input_gates]
        return [chain.pruning.gate for chain in self.chains] if self.mode == "two-stage" else []

    @property
    def first_stage(self) -> bool:
        return self.switch is not None and self.steps < self.switch

    def _enter_stage(self) -> None:
        """Hold the gates that do not learn; bit gates that never learned are open."""
        for gate in (*self.weight_gates, *self.input_gates):
            gate.held = self.mode == "pruning" or self.first_stage
        if self.steps == self.switch:
            for chain in self.chains:
                chain.pruning.gate.hold(chain.pruning.weight)
            if self.recorder is not None:
                self.recorder.clear()

    @torch.no_grad()
    def _clamp(self) -> None:
        thresholds: list[Tensor] = [gate.thresholds for gate in (*self.weight_gates, *self.input_gates)]
        if thresholds:
            torch._foreach_clamp_min_(thresholds, 0.0)
        for chain in self.chains:
            chain.pruning.gate.clamp(chain.pruning.weight)

    def policy(self, budget: Budget) -> Policy:
        """Closed filters pruned, bits within the budget (see `qprune.search.sbs_policy`)."""
        limits = self.limits(self.model, budget, self.convention)
        return Allocation(unwrap(self.model), limits, self.convention, self.mode == "pruning").policy()

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """entropy: mean over bit gates of the entropy of their chance to be open (see sbs_policy), 1 = undecided, 0 = decided; expected:
        bits of every layer as the gates are now; kept: share of the filters that are kept, over all gated layers."""
        entropies = []
        for layer in self.layers.values():
            widths = tuple(layer.weight_quantizer.widths)
            for gate, bits in ((layer.weight_gate.bits, widths), (layer.input_gate, layer.space.a_bits)):
                if isinstance(gate, BitGate):
                    p = gate_probabilities(gate, bits)
                    entropies.append(float((torch.special.entr(p) + torch.special.entr(1 - p)).mean()) / math.log(2))
        rows = [row for row in cost(self.model, convention=self.convention).rows if row.name in self.layers]
        found: dict[str, Any] = {
            "entropy": sum(entropies) / max(len(entropies), 1),
            "expected": {row.name: {"w_bits": float(row.w_bits), "a_bits": float(row.a_bits)} for row in rows},
        }
        if self.chains:
            kept = torch.cat([chain.pruning() for chain in self.chains])
            found["kept"] = float(kept.mean())
        return found


def adopt(optimizers: Optimizers, model: nn.Module) -> None:
    """Let optimizers that have made no step yet train the parameters of a model whose layers were nested since."""
    if optimizers.quantizers is not None:
        optimizers.quantizers.param_groups[0]["params"] = quantizer_parameters(model)
    quantizers = {id(p) for p in quantizer_parameters(model)}
    plain = [p for p in weight_parameters(model) if id(p) not in quantizers and p.dim() <= 1]
    groups = optimizers.weights.param_groups
    without_decay = next((group for group in groups if group["weight_decay"] == 0 and group["params"][0].dim() <= 1), None)
    if without_decay is None:
        optimizers.weights.add_param_group({"params": plain, "weight_decay": 0.0})
    else:
        without_decay["params"] = plain
    if optimizers.weights.defaults["momentum"] > 0 and optimizers.weights.defaults["fused"]:
        for p in plain:  # as Optimizers does for recordable updates
            optimizers.weights.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
