"""The model of time and memory against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qprune import scale
from qprune.scale import BUCKET, Link, Parts, Plan, Size, StepCost

LINK = Link(bandwidth=1e9, latency=1e-3)
PARTS = Parts(
    step={"float": StepCost(0.01, 0.001), "search": StepCost(0.02, 0.002, backward=0.5)},
    evaluation={"float": 0.0005, "search": 0.001},
    gradients={"float": 1e8, "search": 1e8},
    checkpoint={"float": 2.0, "search": 3.0},
    loading=0.004,
    workers=4,
    driver=0.003,
    link=LINK,
    agreements=2,
    once=5.0,
)


def test_a_ring_sends_nearly_twice_the_bytes() -> None:
    assert LINK.all_reduce(1e9, 1) == 0
    assert LINK.all_reduce(1e9, 2) == pytest.approx(1e-3 + 1.0)
    assert LINK.all_reduce(1e9, 8, calls=4) == pytest.approx(4 * 3e-3 + 1.75)
    assert Link().all_reduce(1e9, 64) == 0


@pytest.mark.parametrize(
    ("few", "many", "fixed", "per_image"),
    [
        ((10, 2.0), (20, 3.0), 1.0, 0.1),
        ((10, 1.0), (20, 3.0), 0.0, 0.15),
        ((10, 4.0), (20, 3.0), 3.0, 0.0),
        ((8, 2.0), (8, 2.0), 0.0, 0.25),
    ],
    ids=["between", "no-fixed-share-below-0", "no-slope-below-0", "one-size"],
)
def test_a_step_through_two_measured_ones(few: tuple[int, float], many: tuple[int, float], fixed: float, per_image: float) -> None:
    cost = StepCost.through(few, many)
    assert (cost.fixed, cost.per_image) == pytest.approx((fixed, per_image))
    assert cost.seconds(many[0]) == pytest.approx(many[1])


def test_one_device_computes_and_is_driven() -> None:
    found = scale.step(PARTS, Plan(1000, 100, {}), "float")
    assert (found.computing, found.communication, found.driver) == pytest.approx((0.11, 0.0, 0.003))
    assert found.loading == pytest.approx(0.1) and found.waiting == 0  # 100 images of 4 ms by four workers
    assert found.seconds == pytest.approx(0.113) and found.dominant == "computing"


def test_the_slowest_of_loading_and_training_sets_the_pace() -> None:
    slow = scale.step(replace(PARTS, workers=2), Plan(1000, 100, {}), "float")
    assert slow.seconds == pytest.approx(0.2) and slow.dominant == "loading"
    between = scale.step(replace(PARTS, workers=0), Plan(1000, 100, {}), "float")
    assert between.seconds == pytest.approx(0.113 + 0.4) and between.dominant == "loading"


def test_the_backward_pass_hides_communication_but_for_the_last_bucket() -> None:
    plan = Plan(1000, 400, {}, ranks=4)
    small = 2 * 2e-3  # two agreements, two doublings of the ranks
    buckets = math.ceil(1e8 / BUCKET)
    assert buckets == 4
    summed = buckets * 2e-3 + 1.5 * 0.1
    hidden = scale.step(PARTS, plan, "search")
    assert hidden.computing == pytest.approx(0.22)  # of which half is backward: 0.11 of 0.158 are hidden
    assert hidden.communication == pytest.approx(summed - 0.11 + small)
    fast = scale.step(replace(PARTS, link=Link(1e11, 1e-3)), plan, "search")
    assert fast.communication == pytest.approx(2e-3 + 1.5 * 2.5e7 / 1e11 + small)
    slow = scale.step(replace(PARTS, link=Link(1e7, 1e-3)), plan, "search")
    assert slow.dominant == "communication"


def test_parts_of_a_batch_are_computed_one_after_the_other() -> None:
    plan = Plan(1000, 400, {}, ranks=4, accumulate=2)
    found = scale.step(PARTS, plan, "search")
    assert found.computing == pytest.approx(2 * (0.02 + 0.002 * 50))
    summed = 4 * 2e-3 + 1.5 * 0.1
    assert found.communication == pytest.approx(summed - 0.5 * 0.12 + 2 * 2e-3)  # hidden by the backward pass of the last part alone
    assert found.loading == pytest.approx(0.1)


def test_a_host_that_launches_slowly_bounds_the_step() -> None:
    cost = StepCost(0.01, 0.001, host=0.05)
    parts = replace(PARTS, step={"float": cost}, workers=100)
    assert cost.seconds(10) == 0.05 and cost.seconds(100) == pytest.approx(0.11)
    assert scale.step(parts, Plan(1000, 10, {}), "float").dominant == "launching"
    assert scale.step(parts, Plan(1000, 100, {}), "float").dominant == "computing"


def test_a_run_is_steps_evaluations_checkpoints_and_the_rest() -> None:
    plan = Plan(950, 100, {"float": 2, "search": 1, "uniform": 0}, evaluated=200, ranks=1, minutes=0)
    float_phase = scale.phase(PARTS, plan, "float")
    assert plan.steps == 10
    assert float_phase.training == pytest.approx(2 * (9 * 0.113 + 0.01 + 0.05 + 0.003))  # the last batch has 50 images
    assert float_phase.evaluation == pytest.approx(2 * 200 * 0.0005)
    assert float_phase.checkpoints == pytest.approx(3 * 2.0)
    times = scale.run(PARTS, plan)
    assert times["uniform"] == 0 and times["once"] == 5.0
    assert times["total"] == pytest.approx(times["float"] + times["search"] + 5.0)


def test_checkpoints_within_an_epoch_by_the_clock() -> None:
    plan = Plan(100_000, 100, {"float": 1}, minutes=0.5)
    found = scale.phase(replace(PARTS, workers=100), plan, "float")
    assert found.training == pytest.approx(113.0)
    assert found.checkpoints == pytest.approx((1 + 3 + 1) * 2.0)  # 113 s hold three half minutes


def test_memory_by_part() -> None:
    size = Size(weights=1000, adam=10, buffers=5, mixed=900, kept=50.0, image=3.0)
    alone = scale.memory(size, 8)
    assert alone == {
        "weights": 4060.0, "gradients": 4040.0, "optimizer": 4080.0, "mixed weights": 3600.0, "activations": 400.0, "batches": 72.0,
    }  # fmt: skip
    shared = scale.memory(size, 8, ranks=2, item=2)
    assert shared["gradients"] == 8080.0 and shared["mixed weights"] == 1800.0


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    size = Size(weights=1000, kept=50.0, image=3.0)
    for available in (20_000, 12_059, 12_000, 100):
        found = scale.largest_batch(size, available)
        assert found == 0 or sum(scale.memory(size, found).values()) <= available
        assert sum(scale.memory(size, found + 1).values()) > available
