"""Recorded steps. CUDA graphs need a GPU; elsewhere a stand-in replays a record by calling the recorded update again, so that everything
around the capture is tested: static batches, rates and flags on the device, errors that come later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import qprune
from qprune import Budget, Search, SearchSpace, prepare
from qprune.constants import constant
from qprune.errors import InputError, NonFiniteError
from qprune.gates import set_gates
from qprune.nn import MixedConv2d
from qprune.search import driver, graph
from qprune.search.constraint import Constraint
from qprune.search.edmips import EdMIPS
from qprune.search.optimizers import Optimizers
from qprune.tasks.models import resnet8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class StandIn(graph.Recorder):
    """Records on the CPU: a record is the update with its static batch, run anew at every replay."""

    def __init__(self, device: torch.device, warmup: int = 3) -> None:
        self.warmup, self.calls, self.records, self.replays = warmup, {}, {}, 0

    def aside(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            self.replays += 1
            return run()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[graph.Recorder]:
    if not GPU:
        monkeypatch.setattr(driver, "Recorder", StandIn)
    return driver.Recorder


def _model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(288, 5))
    space = SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter")
    model = prepare(net, space, rules={"5": SearchSpace.fixed(8, 8)}, example_inputs=torch.rand(2, 1, 8, 8))
    qprune.calibrate(model, [torch.rand(8, 1, 8, 8)])
    return model.to(DEVICE).train()


def _data(batches: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 1, 8, 8, generator=g), torch.randint(5, (size,), generator=g)) for _ in range(batches)]


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _run(method: str, data: list[tuple[Tensor, Tensor]], **options: Any) -> tuple[Search, dict[str, Tensor]]:
    model = _model()
    search = Search(model, Budget(bops="w4a4"), method, steps=40, **options)
    search.fit(data, data[::-1] if method == "darts" else None, epochs=2)
    return search, dict(model.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["edmips", "darts"])
def test_a_recorded_search_is_the_same_search(method: str, recorder: type[graph.Recorder]) -> None:
    """The last, smaller batch of each epoch has a record of its own once it came often enough."""
    data = [*_data(8), *_data(1, size=5)]
    plain, want = _run(method, data)
    recorded, got = _run(method, data, cuda_graph=True)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(recorded.history, plain.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.02)
        assert a["multiplier"] == pytest.approx(b["multiplier"], rel=1e-3)
    if isinstance(recorded.method.recorder, StandIn):
        assert recorded.method.recorder.replays == (13 if method == "edmips" else 26)


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported_by_the_next_step(recorder: type[graph.Recorder]) -> None:
    model = _model()
    search = Search(model, Budget(bops="w4a4"), cuda_graph=True)
    batches = [tuple(t.to(DEVICE) for t in batch) for batch in _data(6)]
    for batch in batches[:5]:
        search.step(_loss, batch=batch)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = batches[5]
    result = search.step(_loss, batch=(torch.full_like(x, math.nan), y))
    assert math.isnan(result.loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
    with pytest.raises(NonFiniteError, match="step 5: first non-finite output in layer '0'"):
        search.step(_loss, batch=batches[0])
    search.step(_loss, batch=batches[0])
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_very_first_loss_may_be_the_bad_one(recorder: type[graph.Recorder]) -> None:
    model = _model()
    search = Search(model, Budget(bops="w4a4"), cuda_graph=True)
    x, y = (t.to(DEVICE) for t in _data(1)[0])
    search.step(_loss, batch=(x * math.nan, y))
    with pytest.raises(NonFiniteError):
        search.policy()
    for _ in range(2):
        search.step(_loss, batch=(x, y))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_rates_follow_the_schedule_in_place(recorder: type[graph.Recorder]) -> None:
    search = Search(_model(), Budget(bops="w4a4"), steps=10, cuda_graph=True)
    rate = search.method.optimizers.weights.param_groups[0]["lr"]
    x, y = (t.to(DEVICE) for t in _data(1)[0])
    seen = []
    for _ in range(6):
        search.step(_loss, batch=(x, y))
        seen.append(float(rate))
    assert rate is search.method.optimizers.weights.param_groups[0]["lr"]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_loading_a_state_forgets_the_records(recorder: type[graph.Recorder]) -> None:
    search = Search(_model(), Budget(bops="w4a4"), cuda_graph=True)
    batch = tuple(t.to(DEVICE) for t in _data(1)[0])
    for _ in range(5):
        search.step(_loss, batch=batch)
    assert search.method.recorder is not None
    assert search.method.recorder.records
    search.load_state_dict(search.state_dict())
    assert not search.method.recorder.records


def test_refuses(recorder: type[graph.Recorder]) -> None:
    search = Search(_model(), Budget(bops="w4a4"), cuda_graph=True)
    with pytest.raises(InputError, match=r"pass what changes from step to step as step\(closure, batch=\(x, y\)\)"):
        search.step(lambda m: m(torch.rand(2, 1, 8, 8)).sum())
    with pytest.raises(InputError, match="second_order=True reads numbers back"):
        Search(_model(), Budget(bops="w4a4"), "darts", cuda_graph=True, second_order=True)


SPACES = {
    "factorised": SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter"),
    "joint": SearchSpace((2, 4), (4, 8), joint=True, granularity="filter"),
    "pruning": SearchSpace((0, 2, 4), (4, 8), granularity="filter"),
    "one bit, learned offset": SearchSpace((1, 4), (4, 8), input_quantizer="lsq+"),
}


def _without_values(model: nn.Module) -> None:
    """Every parameter and buffer as a fake tensor; within FakeTensorMode."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])
@pytest.mark.parametrize("name", SPACES)
def test_nothing_in_an_update_waits_for_the_device(name: str, mode: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever reads one back to the host raises. That is what a recorded update must not do."""
    model = prepare(resnet8(), SPACES[name], rules={"conv1": None}, example_inputs=torch.rand(2, 3, 16, 16)).train()
    qprune.calibrate(model, [torch.rand(4, 3, 16, 16)])
    set_gates(model, mode)
    for module in model.modules():
        if isinstance(module, MixedConv2d):
            module.recompute = recompute
    constant.cache_clear()
    with FakeTensorMode():
        _without_values(model)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", lambda value, device=None: value)  # the optimizers' constructors do look at their rates
            optimizers = Optimizers(model, total=10, recordable=True)
        for optimizer in optimizers._all().values():
            for group in optimizer.param_groups:
                group["lr"] = torch.full((), 0.01)
        optimizers.schedule(0)
        method = EdMIPS(model, Constraint({"bops": 1e6}), optimizers, "product", StandIn(torch.device("cpu")))
        batch = (torch.empty(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
        values = method.update(_loss, batch)
        assert values.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            values.tolist()
    constant.cache_clear()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="cuda_graph=True needs a model on a CUDA device, got cpu"):
        Search(_model(), Budget(bops="w4a4"), cuda_graph=True)
