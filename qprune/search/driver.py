"""The search itself: a method's steps, the loop around them, and the policy at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.accumulation import check_parts
from qprune.budget import Budget
from qprune.cost import geometry_of
from qprune.errors import InputError, NonFiniteError, QPruneError
from qprune.gates import set_gates
from qprune.geometry import ExampleInputs
from qprune.nn.mixing import Mixing
from qprune.passes import Passes, endless, following
from qprune.policy import Policy
from qprune.precision import loss_scale
from qprune.prepare import fixed_layers
from qprune.ranks import Ranks, ranks_of
from qprune.record import Record, attach, record_of
from qprune.search.annc import Annc
from qprune.search.constraint import Constraint
from qprune.search.darts import Darts
from qprune.search.edmips import EdMIPS
from qprune.search.graph import Recorder
from qprune.search.method import Closure, Method, StepResult
from qprune.search.optimizers import Optimizers
from qprune.search.sbs import Sbs
from qprune.search.slimmable import Slimmable
from qprune.search.zur import Zur
from qprune.wrappers import unwrap

METHODS: dict[str, type[Method]] = {
    "edmips": EdMIPS,
    "darts": Darts,
    "zur": Zur,
    "slimmable": Slimmable,
    "sbs": Sbs,
    "annc": Annc,
}
Loss = Callable[[Tensor, Tensor], Tensor]


class Search:
    """Learn the bits of a prepared model within a budget.

        search = Search(model, Budget(bops="w4a4"), method="edmips")
        for x, y in loader:
            search.step(lambda m: F.cross_entropy(m(x), y))
        policy = search.policy()

    model           from `prepare`, or built of mixed layers; changed in place. Wrapped in DistributedDataParallel or torch.compile is fine
    budget          what the policy may cost; steers the search and is kept exactly by `policy`
    method          "edmips", "darts", "zur", "slimmable", "sbs" or "annc"
    steps           number of steps planned: weights and quantizers then cool down along a half cosine. None: constant learning rates
    weight_lr, arch_lr, quantizer_lr, weight_decay, momentum    SGD for weights, Adam for gates and for ranges
    final_temperature  with `steps`: the gates' softmax temperature falls from 1 to this, so that the mixture approaches one candidate
    dual_rate, rho  of the budget's Lagrangian (see qprune.search.constraint)
    convention      how bit operations are counted (see qprune.cost)
    example_inputs  for a model that was not prepared with them
    recompute       mix the inputs of convolutions again in the backward pass instead of keeping them: the activation memory of the plain
                    network, for one more pass over every input
    cuda_graph      record the whole step as a CUDA graph and replay it: one launch, no waiting for the device within a step. Batches must
                    be passed to `step` (as `fit` does), and a loss that is not finite is reported by the next step, parameters unchanged
    autocast        bfloat16 or float16: the format in which closures compute what torch.autocast lets them; parameters, quantizers,
                    gates and costs stay as they are. With float16 losses are scaled, and updates whose gradients overflow are left out
    accumulate      parts of the same size, or nearly, that a step's batch is split into along its first dimension: one after the other they
                    make their forward and backward passes, then there is one update. The memory of a part, the result of the batch, up to
                    rounding; but normalisations by batch statistics take those of a part. Losses must be means over the batch, and batches
                    be passed to `step` (as `fit` does). In DistributedDataParallel gradients travel once a step. Closures are called
                    without gradients too: once on the whole batch where ranges are not calibrated yet, and in every step of "sbs", whose
                    gates take the whole batch's residuals
    method_options  of the method, such as second_order=True for "darts", samples=4 for "zur"

    Raises QPruneError for an unknown method, InputError where the geometry is unknown, and InfeasibleBudgetError for a budget that no
    policy meets.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        method: str = "edmips",
        *,
        steps: int | None = None,
        weight_lr: float = 0.02,
        arch_lr: float = 0.02,
        quantizer_lr: float = 2e-3,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        final_temperature: float = 0.3,
        dual_rate: float = 0.02,
        rho: float = 1.0,
        convention: str = "product",
        example_inputs: ExampleInputs | None = None,
        cuda_graph: bool = False,
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        **method_options: Any,
    ) -> None:
        if method not in METHODS:
            raise QPruneError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
        if not isinstance(budget, Budget):
            raise InputError(f"Search: budget must be a Budget, got {type(budget).__name__}; for example Budget(bops='w4a4')")
        if autocast == torch.float16 and (cuda_graph or method_options.get("second_order")):
            what = "cuda_graph" if cuda_graph else "second_order"
            raise InputError(f"Search: {what}=True cannot leave out updates as float16 needs it; take autocast=torch.bfloat16")
        if check_parts(accumulate, "Search") > 1 and cuda_graph:
            raise InputError("Search: cuda_graph=True records a step as a whole; leave it out, or accumulate=1")
        if cuda_graph:
            _check_recordable(ranks_of(model))
        record = record_of(model)
        geometry = geometry_of(model, example_inputs)
        if record is None or record.geometry is None:
            record = Record(geometry, fixed_layers(unwrap(model)))
            attach(unwrap(model), record)
        self.model, self.budget, self.convention = model, budget, convention
        self.limits = METHODS[method].limits(model, budget, convention)
        METHODS[method].check(model, budget, convention)
        if recompute:
            for layer in unwrap(model).modules():
                if isinstance(layer, Mixing):
                    layer.recompute = True
        device = next(model.parameters()).device
        recorder = Recorder(device) if cuda_graph else None
        constraint = Constraint(self.limits, dual_rate, rho, device=device)
        optimizers = Optimizers(model, weight_lr, arch_lr, quantizer_lr, weight_decay, momentum, steps, recordable=cuda_graph)
        self.method = METHODS[method](model, constraint, optimizers, convention, recorder, **method_options)
        self.autocast, self._device = autocast, device
        self.method.loss_scale, self.method.accumulate = loss_scale(autocast, device), accumulate
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self.steps, self.final_temperature = steps, final_temperature
        self.history: list[dict[str, Any]] = []
        self.running: dict[str, Any] | None = None
        self._left: dict[str, Any] | None = None

    def share(self, ranks: Ranks) -> Search:
        """Let the ranks of a distributed job make every step together, each on its share of a batch. The model is wrapped in
        DistributedDataParallel where the method can use that; to be called on all ranks before the first step. With a model that is wrapped
        already, this changes nothing. Raises InputError for a search whose steps are recorded."""
        if self.method.ranks.alone:
            if self.method.recorder is not None:
                _check_recordable(ranks)
            self.method.share(ranks)
            self.model = self.method.model
        return self

    def step(
        self,
        closure: Closure,
        arch_closure: Closure | None = None,
        batch: Sequence[Tensor] = (),
        arch_batch: Sequence[Tensor] = (),
    ) -> StepResult:
        """One step on closure(model, *batch) → loss, without the budget's term. "darts" takes a second closure on other data for the gates;
        without it, calls alternate between weights and gates. Raises NonFiniteError, leaving the parameters as they were, for a NaN or
        infinite loss.

        With cuda_graph=True the tensors that change from step to step must come in through `batch` (and `arch_batch`), since a closure is
        recorded once, and with accumulate those that are to be split: InputError without.
        """
        parts = self.method.accumulate
        why = "cuda_graph=True" if self.method.recorder is not None else f"accumulate={parts}" if parts > 1 else ""
        if why and not (batch and (arch_closure is None or arch_batch)):
            raise InputError(f"{why}: pass what changes from step to step as step(closure, batch=(x, y)), closure(model, x, y)")
        if self.steps:
            set_gates(self.model, temperature=self.final_temperature ** min(self.method.steps / self.steps, 1.0))
        arch_closure = None if arch_closure is None else self.cast(arch_closure)
        return self.method.step(self.cast(closure), arch_closure, batch, arch_batch)

    def skips(self) -> dict[str, int]:
        """With float16: {"skipped": updates left out so far}, for the history."""
        return {} if self.method.loss_scale is None else {"skipped": self.method.loss_scale.skipped}

    def cast(self, closure: Closure) -> Closure:
        """The closure in the format of `autocast`."""
        if self.autocast is None:
            return closure

        def inside(model: nn.Module, *batch: Tensor) -> Tensor:
            with torch.autocast(self._device.type, dtype=self.autocast):
                return closure(model, *batch)

        return inside

    def fit(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        arch_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
        epochs: int = 1,
        loss: Loss = F.cross_entropy,
        on_step: Callable[[StepResult], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        passes: Passes | None = None,
    ) -> list[dict[str, Any]]:
        """Steps over whole loaders of (x, y); arch_loader is the other half of the data that "darts" needs (repeated if it is shorter).

        Returns the history: per epoch the mean loss, accuracy, expected cost over budget, multiplier, gate entropy, and expected bits.

        passes  is told where a pass begins. After `load_state_dict` in a pass, that pass goes on where it was: the loaders' random numbers
                are to be what they were when it began
        """
        if self.method.two_streams and arch_loader is None:
            raise InputError(f"{self.method.name} trains weights and gates on different data: pass arch_loader")
        for _ in range(epochs):
            self.history.append(self._epoch(loader, arch_loader, loss, on_step, passes or Passes()))
            self.running = None
            if on_epoch is not None:
                on_epoch(self.history[-1])
        return self.history

    def _epoch(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        arch_loader: Iterable[tuple[Tensor, Tensor]] | None,
        loss: Loss,
        on_step: Callable[[StepResult], None] | None,
        passes: Passes,
    ) -> dict[str, Any]:
        self.model.train()
        device = next(self.model.parameters()).device

        def counting(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            logits = model(x)
            if torch.is_grad_enabled():  # a step may look at its batch before
                self._hits.add_((logits.detach().argmax(1) == y).sum())
            return loss(logits, y)

        def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return loss(model(x), y)

        zero = torch.zeros((), dtype=torch.float64, device=device)
        nothing: dict[str, Any] = {"batches": 0, "samples": 0, "total": zero, "hits": 0, "values": None}
        self.running = running = self.take_up() or nothing
        self._hits.fill_(int(running["hits"]))
        passes.begin()
        batches = following(loader, running["batches"])
        others = endless(arch_loader, running["batches"]) if arch_loader is not None and self.method.two_streams else None
        for batch in batches:
            other = [] if others is None else [t.to(device, non_blocking=True) for t in next(others)]
            passes.ready()
            x, y = (t.to(device, non_blocking=True) for t in batch)
            try:
                result = self.step(counting, plain if other else None, (x, y), other)
            except NonFiniteError as error:
                error.on(running["batches"], x, y)
                raise
            running["total"] = running["total"].to(device) + result.values[0] * len(y)
            running["samples"] += len(y)
            running["batches"] += 1
            running |= {"values": result.values, "hits": self._hits}
            if on_step is not None:
                on_step(result)
        passes.ready()
        if running["values"] is None:
            raise InputError("the loader gave no batch")
        self.method.settle()
        self.method.end_epoch()
        result = StepResult(running["values"])
        seen = torch.stack([running["total"], zero + running["samples"], self._hits.to(zero)])
        total, samples, hits = self.method.ranks.total(seen).tolist()
        return {
            "epoch": len(self.history),
            "loss": total / samples,
            "accuracy": hits / (samples * self.method.passes),
            "cost_ratio": result.cost_ratio,
            "multiplier": result.multiplier,
            **self.skips(),
            **self.method.summary(),
        }

    def policy(self) -> Policy:
        """The likeliest policy whose exact cost is within the budget. Raises InfeasibleBudgetError if none fits."""
        self.method.settle()
        return self.method.policy(self.budget)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model: optimizers, multipliers, history, and how far the present pass is."""
        running = self.running or self._left
        if running is not None:
            running = {name: value.clone() if isinstance(value, Tensor) else value for name, value in running.items()}
        return {"method": self.method.state_dict(), "history": list(self.history), "running": running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.history = list(state["history"])
        self.running, self._left = None, None if state.get("running") is None else dict(state["running"])

    def take_up(self) -> dict[str, Any] | None:
        """What a loop other than `fit` put in `running` before the state was saved: once, for the loop that goes on with it."""
        left, self._left = self._left, None
        return left


def _check_recordable(ranks: Ranks) -> None:
    if not ranks.alone:
        raise InputError("Search: cuda_graph=True cannot record what the ranks of a distributed job exchange; leave it out")
