"""Gradient accumulation: a step on a batch in parts is the step on the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accumulation_cases import CASES, Batch, compare, data, fitted, network, search_on, task, trainer_on
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import qprune
from qprune import Budget, Search, SearchSpace
from qprune.accumulation import split
from qprune.errors import InputError, NonFiniteError
from qprune.nn.bitgates import BitGate
from qprune.options import OptionError, RunOptions
from qprune.precision import LossScale
from qprune.quantizers import OutputQuantizer
from qprune.search.alternate import alternate
from qprune.tasks.train import Trainer


def test_split() -> None:
    x, y = data(1)[0]
    parts = split(nn.ReLU(), (x, y), 3)
    assert [len(piece[0]) for _, piece in parts] == [4, 3, 3]
    assert [share for share, _ in parts] == [0.4, 0.3, 0.3]
    assert torch.equal(torch.cat([piece[0] for _, piece in parts]), x) and torch.equal(torch.cat([piece[1] for _, piece in parts]), y)
    assert len(split(nn.ReLU(), (x[:2], y[:2]), 3)) == 2
    assert [len(piece[0]) for _, piece in split(nn.ReLU(), (x[:0], y[:0]), 3)] == [0]
    assert [len(piece[0]) for _, piece in split(network(norms=True), (x[:5], y[:5]), 3)] == [3, 2]
    assert len(split(network(norms=True), (x[:1], y[:1]), 3)) == 1
    for wrong in ((x, y[:4]), (x, torch.tensor(1)), (torch.tensor(1),)):
        with pytest.raises(InputError, match="must have one length"):
            split(nn.ReLU(), wrong, 2)


EXACT = [case for case in CASES if case != "zur-uniq"]  # whose quantizers take the statistics of a batch
RANGES = [case for case in EXACT if case.split("-")[0] not in ("slimmable", "annc")]


@pytest.mark.parametrize("case", EXACT)
def test_step(case: str) -> None:
    one, other = (fitted(search_on(case, n), data(2)) for n in (1, 3))
    compare(one, other)
    if hasattr(one.method, "generator"):
        assert torch.equal(one.method.generator.get_state(), other.method.generator.get_state())  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", RANGES)
def test_ranges_start_from_the_whole_batch(case: str) -> None:
    compare(*(fitted(search_on(case, n, calibrated=False), data(2)) for n in (1, 3)))


@pytest.mark.parametrize("case", ["edmips", "darts", "zur", "sbs", "annc"])
def test_several_steps(case: str) -> None:
    """Rounding in float32 moves ranges by less than what separates quantized values."""
    batches = data(8)
    compare(*(fitted(search_on(case, n), batches) for n in (1, 4)), exact=1e-6)


def test_fewer_samples_than_parts() -> None:
    batches = [*data(1, 10), *data(1, 2, seed=2)]
    results = [search_on("edmips", n) for n in (1, 5)]
    for search in results:
        search.fit(batches)
    compare(*results, exact=1e-6)


def test_parts_of_a_batch_are_seen_one_after_the_other() -> None:
    sizes: list[tuple[bool, int]] = []
    search = search_on("edmips", 3)
    search.model.register_forward_pre_hook(lambda module, args: sizes.append((torch.is_grad_enabled(), len(args[0]))))
    search.step(task, batch=data(1)[0])
    assert sizes == [(True, 4), (True, 3), (True, 3)]


def test_gates_decide_by_the_residuals_of_the_batch() -> None:
    """Thresholds lie between what the whole batch and what single parts leave, so that parts alone would open other gates."""
    batch = data(1)[0]
    x = batch[0]
    searches = [search_on("sbs", n) for n in (1, 3)]
    decided: list[list[Tensor]] = []
    for search in searches:
        found: dict[tuple[int, str], Tensor] = {}
        gates = {name: module for name, module in search.model.named_modules() if isinstance(module, BitGate) and "input" in name}
        for i, part in enumerate((x, x[:4], x[4:7], x[7:])):
            with torch.no_grad():
                search.model(part)
            found |= {(i, name): gate.errors.clone() for name, gate in gates.items()}
        for name, gate in gates.items():
            parts = torch.stack([found[i, name] for i in (1, 2, 3)])
            with torch.no_grad():
                gate.thresholds.copy_((found[0, name] + parts.max(0).values) / 2)
            assert (found[0, name] < gate.thresholds).all() and (parts > gate.thresholds).any(0).all()
            gate.errors.fill_(1.0)
        passes: list[bool] = []
        search.model.register_forward_pre_hook(lambda module, args, passes=passes: passes.append(torch.is_grad_enabled()))  # type: ignore[misc]
        search.fit([batch])
        decided.append([gate().detach() for gate in gates.values()])
        assert all(module.teller is None for module in search.model.modules() if isinstance(module, BitGate))
    assert any(not bool(p[-1]) for p in decided[0])
    assert passes.count(True) == 3 and passes.count(False) >= 6  # the second pass sees gates that the first has closed
    for expected, got in zip(*decided, strict=True):
        assert torch.equal(expected, got)
    compare(*searches)


@pytest.mark.parametrize("case", ["edmips", "zur", "zur-uniq", "slimmable"])
def test_running_statistics_take_one_step(case: str) -> None:
    """With equal parts the means are those of the batch, variances the means of the parts'; counts go up by 1."""
    (batch,) = data(1, 12)
    before, one, three = (_statistics(search_on(case, n, norms=True), batch, steps) for n, steps in ((1, 0), (1, 1), (3, 1)))
    assert before and len({len(found) for found in (before, one, three)}) == 1
    moved = 0
    for (name, start), (_, expected), (_, found) in zip(before, one, three, strict=True):
        if not start.is_floating_point() or name.endswith("running_mean"):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        else:
            torch.testing.assert_close(found, expected, rtol=0.2, atol=0.02, msg=lambda text, name=name: f"{name}: {text}")
        moved += not torch.equal(found, start)
    assert moved


def _statistics(search: Search, batch: Batch, steps: int) -> list[tuple[str, Tensor]]:
    first = next(module for module in search.model.modules() if isinstance(module, _NormBase))
    for _ in range(steps):
        search.fit([batch], [batch])
    names = {id(value): name for name, value in first.named_buffers(recurse=False)}
    found = [
        (names[id(value)], value.clone())
        for value in first.buffers(recurse=False)
        if "running" in names[id(value)] or "num" in names[id(value)]
    ]
    for module in first.children():
        found += [(name, value.clone()) for name, value in module.named_buffers()]
    return (
        found + [("average", m.average.clone()) for m in search.model.modules() if isinstance(m, OutputQuantizer) and m.kind == "uniq"][:1]
    )


def test_a_part_that_is_not_finite() -> None:
    """In the last part: nothing has changed but random numbers, and no gradient is left."""
    for case in ("edmips", "darts-second", "zur", "sbs", "annc"):
        search = search_on(case, 3, norms=True)
        x, y = data(1)[0]
        before = {name: value.clone() for name, value in search.model.state_dict().items() if not name.endswith(("choice", "errors"))}
        x[-1] = math.nan
        with pytest.raises(NonFiniteError) as caught:
            search.fit([(x, y)], data(1))
        assert caught.value.batch is not None and torch.equal(caught.value.batch[1], y) and caught.value.index == 0
        if case != "zur":  # its logits have learned from the other batch
            for name, value in before.items():
                assert torch.equal(search.model.state_dict()[name], value), (case, name)
        assert all(p.grad is None for p in search.model.parameters())


def test_trainer() -> None:
    batches = data(4)
    one, other = trainer_on(1), trainer_on(4)
    for trainer in (one, other):
        trainer.fit(batches)
    for (name, expected), found in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    (before,), (after,) = one.history, other.history
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-12)
    assert after["accuracy"] == before["accuracy"]


def test_trainer_calibrates_on_the_whole_batch() -> None:
    batches = data(1)
    states = []
    for accumulate in (1, 3):
        model = qprune.prepare(network(), SearchSpace((2, 4), (2, 4)), example_inputs=batches[0][0])
        trainer = Trainer(model.train(), 1, lr=0.05, accumulate=accumulate)
        trainer.fit(batches)
        states.append((model.state_dict(), trainer.history[0]["accuracy"]))
    for name, expected in states[0][0].items():
        torch.testing.assert_close(states[1][0][name], expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert states[0][1] == states[1][1]


def test_trainer_with_a_part_that_is_not_finite() -> None:
    trainer = trainer_on(3, norms=True)
    x, y = data(1)[0]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    x[-1] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit([(x, y)])
    assert caught.value.index == 0 and caught.value.batch is not None and torch.equal(caught.value.batch[0], x)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())


class Counting(LossScale):
    """Counts how often gradients were divided by the scale."""

    unscaled = 0

    def unscale(self, *args: Any) -> str | None:
        self.unscaled += 1
        return super().unscale(*args)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**120], ids=["fits", "overflows"])
def test_float16(scale: float) -> None:
    """The gradients of all parts are divided by the scale once; if they overflow, one update is left out."""
    (batch,) = data(1, dtype=torch.float32)
    states = []
    for accumulate in (1, 3):
        trainer = trainer_on(accumulate, dtype=torch.float32, autocast=torch.float16)
        trainer.loss_scale = Counting(torch.device("cpu"))
        trainer.loss_scale.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.fit([batch])
        assert trainer.loss_scale.unscaled == 1
        assert trainer.loss_scale.skipped == (scale > 2.0**100)
        states.append(trainer.model.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in states[-1].items()) == (scale > 2.0**100)
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_float16_search() -> None:
    (batch,) = data(1, dtype=torch.float32)
    states = []
    for accumulate in (1, 3):
        model = qprune.prepare(network(dtype=torch.float32), SearchSpace((2, 4), (2, 4)), example_inputs=batch[0])
        search = Search(model.train(), Budget(bops="w3a3"), autocast=torch.float16, accumulate=accumulate)
        search.method.loss_scale = scale = Counting(torch.device("cpu"))
        scale.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        search.step(task, batch=batch)
        assert (scale.unscaled, scale.skipped) == (1, 0)
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("weight", "bias"))})
    start = qprune.prepare(network(dtype=torch.float32), SearchSpace((2, 4), (2, 4)), example_inputs=batch[0]).state_dict()
    for name, expected in states[0].items():
        moved = (expected - start[name]).abs().max()
        assert float(moved) > 0
        torch.testing.assert_close(states[1][name], expected, rtol=0, atol=float(moved) / 20, msg=lambda text, name=name: f"{name}: {text}")


def test_outer_loop_of_zur() -> None:
    batches, histories = data(4), []
    for accumulate in (1, 3):
        search = search_on("zur", accumulate)
        alternate(search, batches[:2], [batches[2:]], 1, homogeneous=True)
        histories.append(search.history[0])
    for name in ("loss", "arch_loss", "likely_loss"):
        assert histories[1][name] == pytest.approx(histories[0][name], rel=1e-6)
    assert histories[1]["homogeneous"] == pytest.approx(histories[0]["homogeneous"], rel=1e-9)


def test_refusals() -> None:
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(InputError, match=f"Search: accumulate is the number of parts of a batch, at least 1, got {wrong!r}"):
            search_on("edmips", wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="Trainer: accumulate"):
            trainer_on(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cuda_graph=True records a step as a whole"):
        Search(qprune.prepare(network(), SearchSpace(), example_inputs=data(1)[0][0]), Budget(bops="w4a4"), cuda_graph=True, accumulate=2)
    x, y = data(1)[0]
    with pytest.raises(InputError, match=r"accumulate=2: pass what changes from step to step as step\(closure, batch="):
        search_on("edmips", 2).step(lambda m: task(m, x, y))
    with pytest.raises(InputError, match="accumulate=2: pass what changes"):
        search_on("darts", 2).step(task, lambda m: task(m, x, y), (x, y))
    search = search_on("edmips", 2)
    with pytest.raises(InputError, match="must have one length"):
        search.step(task, batch=(x, y[:4]))


def test_options() -> None:
    assert RunOptions().accumulate == 1 and RunOptions(batch_size=8, accumulate=8).accumulate == 8
    for wrong in (0, -1, 9):
        with pytest.raises(OptionError, match=rf"accumulate: expected 1 to 8 parts of a batch \(batch_size\), got {wrong}"):
            RunOptions(batch_size=8, accumulate=wrong)
    with pytest.raises(OptionError, match="does not go with accumulate"):
        RunOptions(accumulate=2, cuda_graph=True)
