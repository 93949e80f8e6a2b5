"""Gradient accumulation inside DistributedDataParallel, two processes over gloo: gradients travel once a step, and two ranks on halves of
the data are one process on all of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accumulation_cases import data, network
from ranks import be_one_of_two, two_ranks
from torch import Tensor, nn

import qprune
from qprune import SearchSpace
from qprune.cost import geometry_of
from qprune.errors import NonFiniteError
from qprune.nn.nested import nest
from qprune.search.driver import Search
from qprune.tasks.train import Trainer

STEPS = 2
CASES = ("edmips", "darts", "zur", "sbs")


def trained(wrap: bool, rank: int | None, accumulate: int) -> tuple[list[Tensor], int]:
    """The parameters after STEPS steps of training, and how often a rank was asked to reduce gradients."""
    model = network()
    parallel, reduced = wrapped(model) if wrap else (model, [])
    Trainer(parallel, 1, lr=0.05, accumulate=accumulate).fit(batches(rank))
    return [p.detach() for p in model.parameters()], len(reduced)


def searched(case: str, wrap: bool, rank: int | None, accumulate: int) -> tuple[list[Tensor], int]:
    x = data(1)[0][0]
    space = SearchSpace(pairs=((2, 2), (4, 4)), granularity="filter", placement="output") if case == "zur" else SearchSpace((2, 4))
    model = qprune.prepare(network(), space, example_inputs=x)
    qprune.calibrate(model, [x])
    if case == "sbs":
        nest(model, geometry_of(model))
    parallel, reduced = wrapped(model.train()) if wrap else (model.train(), [])
    options: dict[str, Any] = {"samples": 2} if case == "zur" else {}
    search = Search(parallel, qprune.Budget(bops="w3a3"), case, accumulate=accumulate, **options)
    search.fit(batches(rank), batches(rank)[::-1])
    return [p.detach() for p in model.parameters()], len(reduced)


def wrapped(model: nn.Module) -> tuple[nn.Module, list[int]]:
    """With the list that gets an entry whenever all gradients are reduced."""
    parallel, reduced = nn.parallel.DistributedDataParallel(model), list[int]()

    def count(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.is_last():
            reduced.append(1)
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer() / dist.get_world_size())
        return done

    parallel.register_comm_hook(None, lambda state, bucket: count(bucket))
    return parallel, reduced


def batches(rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """12 samples a step; 6 of them for a rank."""
    half = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
    return [(x[half], y[half]) for x, y in data(STEPS, 12)]


def refused(rank: int) -> list[Any]:
    """What every rank says, and keeps, where the second part of rank 1 is not finite."""
    said: list[Any] = []
    (x, y), *_ = batches(rank)
    x[3 if rank == 1 else 6 :] = math.nan
    for searching in (False, True):
        model = network().train()
        if searching:
            model = qprune.prepare(model, SearchSpace((2, 4)), example_inputs=data(1)[0][0])
            qprune.calibrate(model, [data(1)[0][0]])
        before = [p.detach().clone() for p in model.parameters()]
        parallel, reduced = wrapped(model)
        loop = Search(parallel, qprune.Budget(bops="w3a3"), accumulate=3) if searching else Trainer(parallel, 1, accumulate=3)
        with pytest.raises(NonFiniteError) as caught:
            loop.fit([(x, y)])
        same = all(torch.equal(p, start) and p.grad is None for p, start in zip(model.parameters(), before, strict=True))
        said.append([caught.value.rank, len(reduced), same])
    return said


def work(rank: int) -> dict[str, Any]:
    found = {"trainer": trained(True, rank, 3)} | {case: searched(case, True, rank, 3) for case in CASES}
    said = {case: {"parameters": [p.tolist() for p in parameters], "reduced": reduced} for case, (parameters, reduced) in found.items()}
    return said | {"refused": refused(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks") / "store")


@pytest.mark.parametrize("case", ["trainer", *CASES])
def test_two_ranks_are_one_process(case: str, ranks: tuple[Any, Any]) -> None:
    first, second = ranks
    assert first[case] == second[case]
    expected, _ = trained(False, None, 1) if case == "trainer" else searched(case, False, None, 1)
    for found, value in zip(first[case]["parameters"], expected, strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=value.dtype), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["trainer", *CASES])
def test_gradients_travel_once_a_step(case: str, ranks: tuple[Any, Any]) -> None:
    updates = 2 * STEPS if case == "darts" else STEPS  # of the logits and of the weights
    assert [rank[case]["reduced"] for rank in ranks] == [updates, updates]


def test_a_part_of_one_rank_that_is_not_finite(ranks: tuple[Any, Any]) -> None:
    """All ranks raise the same error, before gradients travel."""
    assert [rank["refused"] for rank in ranks] == [[[1, 0, True], [1, 0, True]]] * 2


if __name__ == "__main__":
    be_one_of_two(work)
