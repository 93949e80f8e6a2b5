"""Filter pruning as a search over widths: the pruning program of Zur et al. (1904.09872).

From the paper's program: a layer of width w uses its first w filters; one weight tensor is trained at homogeneous and at drawn widths
together, losses summed; the distribution of widths (see qprune.search.widths) learns from whole configurations' losses, by score functions;
a configuration's loss is relative to the homogeneous networks' (Method IV), or the task loss plus λ (FLOPs / base)² (Methods I to III).

Ours: one training for all, in which every step of the weights draws widths anew and every step of the logits new samples (the original
trains each sample for 100 epochs from scratch, then takes 40 steps on the same samples); logits learn on data of their own (the original:
the test set), homogeneous losses are measured on that same data; leave-one-out baseline; Adam; widths within a budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qprune.accumulation import mean_of_parts
from qprune.budget import Budget
from qprune.cost import geometry_of
from qprune.errors import BudgetError, InputError
from qprune.geometry import Geometry
from qprune.modes import kept_modes
from qprune.nn.slim import estimating, set_widths, state_of
from qprune.policy import LayerBits, Policy
from qprune.ranks import Ranks
from qprune.search.distributions import Distribution, SoftmaxDistribution
from qprune.search.estimators import Estimate, make_estimator
from qprune.search.fitting import check_limit, fit_widths
from qprune.search.method import Closure, Method, StepResult
from qprune.search.paths import RandomPath
from qprune.search.penalties import penalty
from qprune.search.relative import relative_loss
from qprune.search.relaxations import Relaxation
from qprune.search.widths import WIDTHS, BinomialLayers
from qprune.space import FLOAT, PRUNED
from qprune.wrappers import unwrap

STATISTICS = ("batch", "reestimated")
RELATIVE = "relative"


class Slimmable(Method):
    """Search the widths of a network from `qprune.nn.slim.slim`, whose `ratios` are the homogeneous widths that are trained along.

    distribution   "categorical", "multinomial", "binomial" or "block-binomial"
    estimator      "score-loo"; "score" is the original's; those that force a layer ("random-path", …) need "categorical" or "multinomial"
    samples        configurations per step of the logits
    train_samples  drawn configurations per step of the weights, beside the homogeneous ones
    loss           "relative" (Method IV), or task loss + lmbda · f(FLOPs/base) with a shape f of qprune.search.penalties, in Methods I to
                   III "square"
    lmbda, base    of those; base in multiplications, None: the budget (the original: the narrowest homogeneous network)
    statistics     how drawn configurations are normalised when they are measured: "batch", or "reestimated" on the weights' batch
    logit_lr       of Adam. clip_grad: joint norm of all logits' gradients, None: not clipped
    seed           of all draws

    In one stream of data (no arch_closure) steps alternate: weights, logits, weights, … `last_estimate` is the last gradient of the logits
    with its variance. Raises InputError for unknown options and networks that are not slim, BudgetError for a budget of anything but macs,
    InfeasibleBudgetError if no widths fit.
    """

    name = "slimmable"
    two_streams = True
    network_options = ("ratios", "shortcut", "order")

    def __init__(
        self,
        *args: Any,
        distribution: str = "binomial",
        estimator: str = "score-loo",
        samples: int = 8,
        train_samples: int = 1,
        loss: str = RELATIVE,
        lmbda: float = 1.0,
        base: float | None = None,
        statistics: str = "batch",
        logit_lr: float = 0.05,
        clip_grad: float | None = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(*args)
        if not self.ranks.alone:
            raise InputError(
                "slimmable: DistributedDataParallel wants gradients of all parameters in every pass; give the model itself, and share the "
                "search: Search(model, …).share(qprune.ranks.current())"
            )
        if self.recorder is not None:
            raise InputError("slimmable: every step has other shapes, so that it cannot be recorded; leave out cuda_graph=True")
        if distribution not in WIDTHS:
            raise InputError(f"slimmable: unknown distribution {distribution!r}; expected one of {', '.join(WIDTHS)}")
        if statistics not in STATISTICS:
            raise InputError(f"slimmable: unknown statistics {statistics!r}; expected one of {', '.join(STATISTICS)}")
        if train_samples < 0:
            raise InputError(f"slimmable: train_samples must not be negative, got {train_samples}")
        state = state_of(self.model)
        self.structure, self.ratios = state.structure, state.ratios
        self.limit = _macs_limit(self.constraint.limits)
        self.space = WIDTHS[distribution](self.structure, self.ratios, next(self.model.parameters()).device)
        check_limit(self.space, self.limit)
        self.estimator = make_estimator(estimator, samples=samples)
        if isinstance(self.estimator, Relaxation):
            raise InputError(f"slimmable: estimator {estimator!r} mixes candidates, but a network has one width at a time; use 'score-loo'")
        if isinstance(self.estimator, RandomPath) and not all(isinstance(part, SoftmaxDistribution) for part in self.space.parts):
            raise InputError(
                f"slimmable: estimator {estimator!r} forces layers to ratios, which distribution {distribution!r} has not; use "
                "'categorical' or 'multinomial', or the estimator 'score-loo'"
            )
        self.penalty = None if loss == RELATIVE else penalty(loss)
        self.lmbda, self.base = lmbda, self.limit if base is None else base
        self.train_samples, self.statistics, self.clip_grad = train_samples, statistics, clip_grad
        self.passes = len(self.ratios) + train_samples
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = torch.optim.Adam([part.logits for part in self.space.parts], logit_lr, betas=(0.5, 0.999))
        self.last_estimate: Estimate | None = None

    @classmethod
    def limits(cls, model: nn.Module, budget: Budget, convention: str = "product") -> dict[str, float]:
        """The budget as multiplications of convolutions: a share is one of the full network's convolutions. Raises BudgetError for other
        measures."""
        others = set(budget.amounts) - {"macs"}
        if others:
            raise BudgetError(f"slimmable: widths cost multiplications, got a budget of {', '.join(sorted(others))}; use macs='50%'")
        geometry = geometry_of(model)
        convolutions = {name: layer for name, layer in geometry.layers.items() if layer.kind != "Linear"}
        return budget.limits(Geometry(convolutions), convention=convention)

    @classmethod
    def check(cls, model: nn.Module, budget: Budget, convention: str) -> None:
        """Raise InfeasibleBudgetError if one filter per layer is too much. Whether the distribution has widths that fit, is checked when it
        is made."""
        structure = state_of(model).structure
        check_limit(BinomialLayers(structure, (1.0,)), _macs_limit(cls.limits(model, budget, convention)))

    def share(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """Logits learn from arch_closure, then weights from closure; the loss reported is the mean over the trained configurations."""
        self.optimizers.schedule(self.steps)
        if arch_closure is None and self.steps % 2 == 1:
            return self.result(self.arch_update(closure, batch, closure, batch))
        if arch_closure is not None:
            # a closure that is not given batches knows its data itself
            self.arch_update(arch_closure, arch_batch, arch_closure if batch else closure, batch)
        return self.result(self.weight_update(closure, batch))

    def weight_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """One step on the sum of the losses of the homogeneous and the drawn widths."""
        self.optimizers.zero_grad()
        drawn = self.space.widths([part.sample(self.train_samples, self.generator) for part in self.space.parts])
        total = torch.zeros((), dtype=torch.float64, device=drawn.device)
        try:
            for widths in itertools.chain(map(self.structure.homogeneous, self.ratios), map(self.named, drawn)):
                set_widths(self.model, widths)
                loss = self.task_loss(closure, batch)
                self.scaled(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach().to(total.device)
        finally:
            self._widen()
        self._average_gradients()
        self.unscale()
        self.optimizers.step_weights()
        return self._values(total / self.passes)

    def arch_update(self, closure: Closure, batch: Sequence[Tensor], train: Closure, train_batch: Sequence[Tensor]) -> Tensor:
        """One step of the logits on closure, with statistics, if they are re-estimated, from `train`."""
        problem = _Configurations(self, self._measured(closure, batch), self._measured(train, train_batch))
        try:
            estimate = self.estimator(problem, self.generator)
        finally:
            self._widen()
        self.last_estimate = estimate
        bad = estimate.losses[~torch.isfinite(estimate.losses)]
        if len(bad):
            self._refuse(float(bad[0]), closure, batch)
        for part, gradient in zip(self.space.parts, estimate.gradients, strict=True):
            part.logits.grad = gradient
        if self.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_([part.logits for part in self.space.parts], self.clip_grad)
        self.logits.step()
        return self._values(problem.measured.mean())

    def _average_gradients(self) -> None:
        with_gradient = [p for p in unwrap(self.model).parameters() if p.grad is not None]
        gradients = [p.grad for p in with_gradient if p.grad is not None]
        for p, mean in zip(with_gradient, self.ranks.means(gradients), strict=True):
            p.grad = mean

    def _measured(self, closure: Closure, batch: Sequence[Tensor]) -> Callable[[], Tensor]:
        """The loss without gradients, from the parts of a batch in turn."""
        return lambda: mean_of_parts(self.model, lambda *part: closure(self.model, *part), batch, self.accumulate)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """The widths that the distribution stands for."""
        set_widths(self.model, self.extracted())
        try:
            yield
        finally:
            self._widen()

    def named(self, widths: Tensor) -> dict[str, int]:
        return dict(zip(self.structure.names, widths.tolist(), strict=True))

    def extracted(self) -> dict[str, int]:
        """The widths that the distribution stands for, whatever they cost."""
        return self.named(self.space.widths_of(self.space.extract().unsqueeze(0))[0])

    def widths(self, budget: Budget | None = None, spend: bool = True) -> dict[str, int]:
        """Widths within the budget (None: the search's own), see qprune.search.fitting."""
        limit = self.limit if budget is None else _macs_limit(self.limits(self.model, budget))
        return fit_widths(self.space, limit, spend)

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """entropy: mean over the logits' distributions, 1 = undecided as at the start, 0 = decided; widths: those extracted now."""
        shares = []
        for part in self.space.parts:
            p = part.logits.double()
            p = p.softmax(-1) if isinstance(part, SoftmaxDistribution) else torch.cat([p.sigmoid(), (-p).sigmoid()])
            shares.append(float(torch.special.entr(p).sum()) / math.log(max(len(p), 2)))
        return {"entropy": sum(shares) / len(shares), "expected": {}, "widths": self.extracted()}

    def policy(self, budget: Budget | None = None) -> Policy:
        """`widths` as a policy: filters beyond the width at 0 bits, the others at 32; shortcut convolutions as conv2 of their block.

        It names filters as the slim network orders them. A policy has no word for a shortcut between unequal widths, so its own cost lacks
        those; the network to use is `qprune.nn.slim.extract(model, widths)`.
        """
        widths = self.widths(budget)
        widths |= {s.own: widths[s.target] for s in self.structure.shortcuts if s.own is not None}
        geometry = geometry_of(self.model)
        layers = {}
        for name, width in widths.items():
            filters = geometry.layers[name].filters
            layers[name] = LayerBits((FLOAT,) * width + (PRUNED,) * (filters - width), FLOAT)
        return Policy({name: layers[name] for name in geometry.layers if name in layers}, geometry)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "widths": [part.logits.detach().clone() for part in self.space.parts],
            "logits": self.logits.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for part, logits in zip(self.space.parts, state["widths"], strict=True):
                part.logits.copy_(logits)
        self.logits.load_state_dict(state["logits"])
        self.generator.set_state(state["generator"])

    def _values(self, loss: Tensor) -> Tensor:
        """What a StepResult holds: the cost is that of the widths extracted now."""
        cost = self.structure.flops(self.structure.vector(self.extracted())).double()
        multiplier = 0.0 if self.penalty is None else self.lmbda
        return torch.stack([loss.detach().double().cpu(), cost / self.limit, torch.tensor(multiplier, dtype=torch.float64)])

    def _widen(self) -> None:
        """All filters, as the state_dict of the model expects: temporary shortcuts are gone."""
        set_widths(self.model, self.structure.homogeneous(1.0))


def _macs_limit(limits: Mapping[str, float]) -> float:
    if set(limits) != {"macs"}:
        raise BudgetError(f"slimmable: needs a budget of macs and nothing else, got {', '.join(limits) or 'none'}; use Budget(macs='50%')")
    return limits["macs"]


class _Configurations:
    """The losses of drawn configurations on one batch, as estimators ask for them."""

    def __init__(self, method: Slimmable, loss: Callable[[], Tensor], train: Callable[[], Tensor]) -> None:
        self.method, self.loss, self.train = method, loss, train
        self.measured = torch.zeros(0, dtype=torch.float64)
        self._homogeneous: tuple[Tensor, Tensor] | None = None

    @property
    def distributions(self) -> Sequence[Distribution]:
        return self.method.space.parts

    @torch.no_grad()
    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        method = self.method
        widths = method.space.widths(draws)
        self.measured = self.task_losses([method.named(row) for row in widths])
        cost = method.structure.flops(widths).double()
        if method.penalty is not None:
            return self.measured + method.lmbda * method.penalty(cost / method.base)
        return relative_loss(self.measured, cost, *self.homogeneous(widths.device))

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        raise NotImplementedError("a network has one width at a time")

    def homogeneous(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cost, loss) of the homogeneous networks on the same batch."""
        if self._homogeneous is None:
            structure, widths = self.method.structure, [self.method.structure.homogeneous(r) for r in self.method.ratios]
            cost = torch.stack([structure.flops(structure.vector(w)) for w in widths]).double()
            self._homogeneous = cost.to(device), self.task_losses(widths)
        return self._homogeneous

    def task_losses(self, configurations: Sequence[Mapping[str, int]]) -> Tensor:
        """Float64, in eval mode."""
        method, model, found = self.method, self.method.model, []
        with kept_modes(unwrap(model)):
            for widths in configurations:
                set_widths(model, widths)
                if method.statistics == "reestimated":
                    with estimating(model):
                        self.train()
                model.eval()
                found.append(self.loss().double())
        return method.ranks.mean(torch.stack(found))
