"""Filter-level quantization search: Zur et al., "Towards Learning of Filter-Level Heterogeneous Compression of Convolutional Neural
Networks" (1904.09872).

From the paper: a candidate is a pair (weight bits, activation bits) per filter, the activation being quantized where it is produced; one
vector of logits per layer parameterises a multinomial over the counts of its filters; weights train on one half of the data under the task
loss, in a configuration that is drawn anew for every batch; logits train on the other half by the score function of S drawn configurations,
evaluated with everything quantized; their loss is CE + λ (B / B0)², B the exact bit operations of each configuration; gradients of all
logits are clipped together to norm 10, of all weights to norm 5; deterministic extraction (`qprune.search.extraction.extract`).

Ours, each with the original as an option: a leave-one-out baseline (estimator="score" has none); the gradient of the closed-form expected
cost in an augmented Lagrangian that steers to a budget (cost="sampled", penalty="square"); more bits to the filters that are more
sensitive (assignment="index"); candidates that share a weight (SearchSpace(shared_weights=False)); Adam for the logits (optimizer="sgd":
plain SGD, the rate times 0.999 per step); normalisation by each configuration's own batch (statistics="running"); and counts within the
exact budget in place of the extraction. Gradual quantization belongs to the paper's outer loop: see qprune.search.alternate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.cost import cost as cost_of
from qprune.errors import InputError
from qprune.gates import set_gates
from qprune.modes import kept_modes
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.stacked import STATISTICS
from qprune.policy import Policy
from qprune.prepare import weight_parameters
from qprune.search.configurations import Configurations, OnBatch
from qprune.search.counts import allocate_counts, check_feasible_counts
from qprune.search.distributions import Freezer
from qprune.search.estimation import Estimate
from qprune.search.estimators import ESTIMATORS, make_estimator
from qprune.search.expected import Expected
from qprune.search.method import Closure, Method, StepResult
from qprune.search.penalties import PENALTIES
from qprune.search.relaxations import Relaxation
from qprune.search.stages import Stages
from qprune.search.unitcost import UnitCost
from qprune.wrappers import unwrap

DECAY = 0.999
_CHOICES = {
    "assignment": ("sensitivity", "index"),
    "penalty": ("lagrangian", *PENALTIES),
    "cost": ("expected", "sampled"),
    "optimizer": ("adam", "sgd"),
    "statistics": STATISTICS,
    "estimator": tuple(ESTIMATORS),
}


class Zur(Method):
    """estimator    of the logits' gradient (see qprune.search.estimators)
    samples      configurations per logit step
    assignment   "sensitivity": the more sensitive a filter, the more bits; "index": the first n_0 filters get candidate 0, …
    penalty      "lagrangian": the budget's constraint; or a shape f of qprune.search.penalties: λ f(B / budget)
    lmbda        λ
    cost         "expected": the penalty of the expected cost, differentiated; "sampled": of each configuration's exact cost, estimated
    temperature  of the Gumbel relaxation, for estimator "gumbel"
    freeze       (probability, steps): decided layers are no longer searched (see distributions.Freezer); None: never
    staged       `alternate` trains the weights in stages; False: everything quantized from the start
    statistics   normalisation of the configurations of a logit step: by their own "batch", or by "running" statistics
    clip_grad    largest joint norm of all logits' gradients; None: no limit
    clip_weights the same of all weights' gradients
    optimizer    of the logits
    seed         of the draws

    sensitivity of a filter: the running mean over weight steps of Σ (∂L/∂W ∘ (W − Q(W)))², Q being quantization to the fewest bits.
    last_estimate: the estimate of the last logit step, with its variance. The expected cost takes filters as independent draws: exact for a
    cost that is bilinear in the bits; not for grouped convolutions, whose filters' places `assignment` fixes, nor for widths of sums.

    Between steps the model computes the last configuration that was drawn. Raises InputError for a model without units, for other options
    than these, and for a recorder: what is drawn is decided on the host.
    """

    name = "zur"
    two_streams = True
    network_options = ("shared_weights",)

    def __init__(
        self,
        *args: Any,
        estimator: str = "score-loo",
        samples: int = 8,
        assignment: str = "sensitivity",
        penalty: str = "lagrangian",
        lmbda: float = 1.0,
        cost: str = "expected",
        temperature: float = 1.0,
        freeze: Sequence[float] | None = None,
        staged: bool = True,
        statistics: str = "batch",
        clip_grad: float | None = 10.0,
        clip_weights: float | None = 5.0,
        optimizer: str = "adam",
        seed: int = 0,
    ) -> None:
        super().__init__(*args)
        if self.recorder is not None:
            raise InputError(
                "zur: configurations are drawn on the host and their losses read back in every step, which cannot be recorded; "
                "leave out cuda_graph=True"
            )
        given = (
            ("assignment", assignment), ("penalty", penalty), ("cost", cost),
            ("optimizer", optimizer), ("statistics", statistics), ("estimator", estimator),
        )  # fmt: skip
        for name, value in given:
            if value not in _CHOICES[name]:
                raise InputError(f"zur: {name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
        self.estimator = make_estimator(estimator, samples=samples, **({"temperature": temperature} if estimator == "gumbel" else {}))
        if cost == "sampled" and (penalty == "lagrangian" or isinstance(self.estimator, Relaxation)):
            raise InputError(
                "zur: cost='sampled' needs a penalty of each configuration, like penalty='square', and an estimator that draws them"
            )
        self.assignment, self.penalty, self.lmbda, self.sampled_cost = assignment, penalty, lmbda, cost == "sampled"
        self.staged, self.statistics, self.clip_grad = staged, statistics, clip_grad
        self.clip_weights, self._weights = clip_weights, weight_parameters(self.model)
        costs = UnitCost(self.model, tuple(self.constraint.limits), self.convention)
        self.configurations = Configurations(self.model, costs)
        self.logits = [d.logits for d in self.configurations.distributions]
        self.stages = Stages(self.model)
        self.freezer = None if freeze is None else Freezer(*_pair(freeze))
        self.decay = optimizer == "sgd"
        if self.decay and self.optimizers.arch is not None:
            self.optimizers.arch = torch.optim.SGD(self.logits, self.optimizers.arch.param_groups[0]["lr"])  # type: ignore[assignment]
        if penalty != "lagrangian":
            self.constraint.multipliers = dict.fromkeys(self.constraint.limits, lmbda)
        self.generator = torch.Generator().manual_seed(seed)
        self.sensitivity = {name: torch.zeros(u.out_channels, device=u.weight.device) for name, u in self.configurations.units.items()}
        self.weight_steps = 0
        self.last_estimate: Estimate | None = None
        self._slack: Tensor | None = None
        set_gates(self.model, mode="fixed")
        self.configurations.use(self.configurations.likely())

    @classmethod
    def check(cls, model: nn.Module, budget: Budget, convention: str) -> None:
        check_feasible_counts(model, budget, convention)

    def policy(self, budget: Budget) -> Policy:
        """The likeliest counts within the budget, with what is left of it spent on more bits (see `allocate_counts`)."""
        return allocate_counts(self.model, budget, self.convention, spend=True, sensitivity=self._measured())

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """The paper's configuration of the present logits."""
        self._rank()
        self.configurations.use(self.configurations.likely())
        yield

    @functools.cached_property
    def expected_cost(self) -> Callable[[], Expected]:  # type: ignore[override]
        def expected() -> Expected:
            full = cost_of(self.model, convention=self.convention)
            return Expected(full.bops, full.macs, full.size_bits)

        return expected

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """Logits learn from arch_closure, then weights from closure. With one closure, calls alternate: weights, logits, weights, …"""
        if arch_closure is None and self.steps % 2 == 1:
            return self.logit_step(closure, batch)
        if arch_closure is not None:
            self.logit_update(arch_closure, arch_batch)
        return self.weight_step(closure, batch)

    def weight_step(self, closure: Closure, batch: Sequence[Tensor] = ()) -> StepResult:
        """One update of the weights in a configuration that is drawn for it, under the task loss."""
        self.optimizers.schedule(self.steps)
        return self.result(self.weight_update(closure, batch))

    def logit_step(self, closure: Closure, batch: Sequence[Tensor] = ()) -> StepResult:
        """One update of the logits."""
        return self.result(self.logit_update(closure, batch))

    def weight_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        self._rank()
        self.configurations.use(self.configurations.sample(1, self.generator))
        self.stages.renew(self.generator)
        self.optimizers.zero_grad()
        loss = self.task_loss(closure, batch)
        self.backward(loss)
        if self.clip_weights is not None:
            nn.utils.clip_grad_norm_(self._weights, self.clip_weights)
        if self.assignment == "sensitivity":
            self._measure()
        self.optimizers.step_weights()
        return self.values(loss, self._present_slack())

    def logit_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        self._rank()
        penalty = self._penalties if self.sampled_cost else None
        problem = OnBatch(self.configurations, closure, batch, self.statistics, penalty, self.accumulate)
        estimate = self.estimator(problem, self.generator)
        task = torch.cat(problem.seen)
        finite = bool(torch.isfinite(estimate.losses).all())
        if not self.ranks.all(finite):
            bad = task[~torch.isfinite(task)]
            self._refuse(float(bad[0]) if len(bad) else 0.0 if finite else torch.nan, closure, batch)
        self.last_estimate = estimate
        self.optimizers.zero_grad()
        slack = self.constraint.slack(self.expected_cost())
        if not self.sampled_cost:
            (self.constraint.penalty(slack) if self.penalty == "lagrangian" else self._penalties_of(slack.exp()).sum()).backward()
        self._add(estimate.gradients)
        self.optimizers.step_arch()
        self._after_logits(slack)
        return self.values(task.mean(), slack.detach())

    def _add(self, gradients: Sequence[Tensor]) -> None:
        """To what the logits have; the ranks of a distributed job agree on the mean."""
        for logits, g in zip(self.logits, self.ranks.means(gradients), strict=True):
            logits.grad = g if logits.grad is None else logits.grad + g
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.logits, self.clip_grad)

    def _after_logits(self, slack: Tensor) -> None:
        if self.freezer is not None:
            self.freezer.update([logits.data for logits in self.logits])
        if self.decay and self.optimizers.arch is not None:
            for group in self.optimizers.arch.param_groups:
                group["lr"] *= DECAY
        if self.penalty == "lagrangian":
            self.constraint.update(slack)
        self._slack = None

    def _penalties(self, cost: Tensor) -> Tensor:
        """What exact costs [S, limits] add to the losses [S]."""
        limits = torch.tensor(list(self.constraint.limits.values()), dtype=torch.float64, device=cost.device)
        return self._penalties_of(cost / limits).sum(-1)

    def _penalties_of(self, ratio: Tensor) -> Tensor:
        return self.lmbda * PENALTIES[self.penalty](ratio)

    @torch.no_grad()
    def _present_slack(self) -> Tensor:
        """Of the present logits; only a logit step changes it."""
        if self._slack is None:
            self._slack = self.constraint.slack(self.expected_cost())
        return self._slack

    @torch.no_grad()
    def _measure(self) -> None:
        """The gradients of a weight step enter the filters' sensitivities."""
        self.weight_steps += 1
        with kept_modes(unwrap(self.model)):
            for name, unit in self.configurations.units.items():
                self.sensitivity[name] += (_sensitivity(unit) - self.sensitivity[name]) / self.weight_steps

    def _rank(self) -> None:
        measured = self._measured()
        if measured is not None:
            self.configurations.order = {name: value.argsort(stable=True) for name, value in measured.items()}

    def _measured(self) -> dict[str, Tensor] | None:
        return self.sensitivity if self.assignment == "sensitivity" and self.weight_steps else None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "generator": self.generator.get_state(),
            "sensitivity": {name: value.clone() for name, value in self.sensitivity.items()},
            "weight_steps": self.weight_steps,
            "order": {name: value.clone() for name, value in self.configurations.order.items()},
            "stages": self.stages.state_dict(),
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])
        self.weight_steps, self._slack = state["weight_steps"], None
        for name, value in self.sensitivity.items():
            value.copy_(state["sensitivity"][name])
        self.configurations.order = {name: value.to(self.sensitivity[name].device) for name, value in state["order"].items()}
        self.stages.load_state_dict(state["stages"])
        if self.freezer is not None:
            self.freezer.load_state_dict(state["freezer"])


def _pair(freeze: Sequence[float]) -> tuple[float, int]:
    if isinstance(freeze, str) or not isinstance(freeze, Sequence) or len(freeze) != 2:
        raise InputError(f"zur: freeze must be (probability, steps) like (0.8, 10), or None, got {freeze!r}")
    return float(freeze[0]), int(freeze[1])


def _sensitivity(unit: FilterConv2d) -> Tensor:
    """Σ (∂L/∂W ∘ (W − Q(W)))² of every filter [F]; with a weight per candidate, summed over them (only chosen ones have a gradient)."""
    weights = unit.each_weight() if unit.own else (unit.weight,)
    assert unit.weight.grad is not None
    quantizer = unit.weight_quantizer.eval()
    lowest = min(range(len(quantizer.bits)), key=lambda k: quantizer.bits[k])
    one_hot = torch.eye(len(quantizer.bits), device=unit.weight.device)[lowest]
    gradients = unit.weight.grad.chunk(len(weights))
    changes = [g * (w - quantizer(w, one_hot)) for g, w in zip(gradients, weights, strict=True)]
    return torch.stack([change.float().square().flatten(1).sum(1) for change in changes]).sum(0)
