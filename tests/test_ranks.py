"""How the processes of a job agree: values, errors, models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import be_one_of_two, two_ranks
from torch import Tensor, nn

import qprune
from qprune.errors import BackendError, InputError, NonFiniteError
from qprune.options import RunOptions
from qprune.precision import check, synchronised
from qprune.ranks import ALONE, RankError, Ranks, current, joined, ranks_of
from qprune.tasks.train import Trainer, evaluate


def caught(kind: type[Exception], work: Any) -> str:
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no {kind.__name__}")


def failing() -> None:
    raise ValueError("no such file")


def searches() -> dict[str, Any]:
    """With a model that is wrapped already."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    mixed = qprune.prepare(net, qprune.SearchSpace((2, 4), (2, 4)), example_inputs=torch.randn(1, 1, 6, 6))
    model, budget = current().wrapped(mixed), qprune.Budget(bops="w3a3")
    return {
        "shared": qprune.Search(model, budget).share(current()).model is model,
        "recorded": caught(InputError, lambda: qprune.Search(model, budget, cuda_graph=True)),
    }


def exchange(rank: int) -> dict[str, Any]:
    ranks = current()
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(float(rank))
    wrapped = ranks.wrapped(model)
    begun = model.weight.tolist()
    with torch.no_grad():
        model.weight.add_(rank)
    ranks.synchronise(model)
    return {
        "place": (ranks.rank, ranks.count, ranks.main, ranks.shard),
        "largest": ranks.largest(rank, 5 - rank),
        "all": [ranks.all(True), ranks.all(rank == 0)],
        "total": ranks.total(torch.tensor([1.0, rank])).tolist(),
        "means": [t.tolist() for t in ranks.means([torch.tensor([[1.0 + rank]]), torch.tensor([4.0 * rank, 2.0])])],
        "gathered": ranks.gathered({"rank": rank}),
        "from_main": ranks.from_main(lambda: f"of rank {rank}"),
        "agree": ranks.agree("policy", "the same"),
        "disagree": caught(RankError, lambda: ranks.agree("policy", f"of rank {rank}")),
        "failed": caught((RankError if rank else ValueError), lambda: ranks.from_main(failing)),
        "wrapped": [ranks_of(wrapped).count, ranks_of(model).count, begun, model.weight.tolist()],
    }


def nonfinite(rank: int) -> dict[str, Any]:
    """Losses that are not finite on rank 1 alone, in a search of each kind and in training."""
    found = {}
    for method in ("edmips", "zur", "slimmable"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
        if method == "slimmable":
            model: nn.Module = qprune.nn.slim.slim(net, x, (0.5, 1.0), shortcut="temporary")
            search = qprune.Search(model, qprune.Budget(macs="50%"), method, samples=2)
        else:
            zur = {"placement": "output", "weight_quantizer": "nice", "input_quantizer": "nice", "granularity": "filter"}
            space = qprune.SearchSpace(pairs=((2, 2), (4, 4)), **(zur if method == "zur" else {}))
            rules = {"5": None} if method == "zur" else None
            model = qprune.calibrate(qprune.prepare(net, space, rules, x), [x])
            search = qprune.Search(model, qprune.Budget(bops="w3a3"), method)
        search.share(current())
        before = [p.detach().clone() for p in model.parameters()]

        def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(m(x), y) * (torch.nan if rank else 1.0)

        arch = loss if search.method.two_streams else None
        found[method] = caught(NonFiniteError, lambda: search.step(loss, arch, (x, y), (x, y) if arch else ()))  # noqa: B023
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    trainer = Trainer(nn.Linear(3, 2), 1)
    trainer.share(current())
    batch = (torch.full((4, 3), torch.inf if rank else 1.0), torch.zeros(4, dtype=torch.int64))
    found["training"] = caught(NonFiniteError, lambda: trainer.run_epoch([batch]))
    return found


def measured(rank: int) -> list[tuple[float, float]]:
    """Of three samples rank 0 has two; in the second measurement rank 1 has none."""
    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    mine = [(x[rank::2], y[rank::2])]
    return [evaluate(nn.Identity(), mine, ranks=current()), evaluate(nn.Identity(), mine if rank == 0 else [], ranks=current())]


def work(rank: int) -> dict[str, Any]:
    return {"exchange": exchange(rank), "searches": searches(), "nonfinite": nonfinite(rank), "measured": measured(rank)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks") / "store")


def test_values(both: tuple[Any, Any]) -> None:
    for rank, found in enumerate(both):
        found = found["exchange"]
        assert found["place"] == [rank, 2, rank == 0, [rank, 2]]
        assert found["largest"] == [1, 5]
        assert found["all"] == [True, False]
        assert found["total"] == [2.0, 1.0]
        assert found["means"] == [[[1.5]], [2.0, 2.0]]
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert found["from_main"] == "of rank 0"
        assert found["agree"] is None
        assert found["disagree"].startswith(
            "RankError: the ranks have come to different results: the policy of rank 1 is not that of rank 0"
        )
        assert found["wrapped"] == [2, 1, [[0.0, 0.0]], [[0.0, 0.0]]]
    assert both[0]["exchange"]["failed"] == "ValueError: no such file"
    assert both[1]["exchange"]["failed"] == "RankError: rank 0 stopped (ValueError: no such file)"


def test_models_that_are_wrapped(both: tuple[Any, Any]) -> None:
    for found in both:
        assert found["searches"]["shared"]
        assert found["searches"]["recorded"].startswith("InputError: Search: cuda_graph=True cannot record what the ranks")


def test_recorded_steps_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    mixed = qprune.prepare(net, qprune.SearchSpace((2, 4), (2, 4)), example_inputs=torch.randn(1, 1, 6, 6))
    search = qprune.Search(mixed, qprune.Budget(bops="w3a3"))
    monkeypatch.setattr(search.method, "recorder", object())
    with pytest.raises(InputError, match="cuda_graph=True cannot record what the ranks"):
        search.share(Ranks(0, 2))
    assert search.share(ALONE).model is mixed


@pytest.mark.parametrize("kind", ["edmips", "zur", "slimmable", "training"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(kind: str, both: tuple[Any, Any]) -> None:
    first, second = (found["nonfinite"][kind] for found in both)
    assert first == second
    assert first.startswith("NonFiniteError: loss is nan at step 0 on rank")
    assert kind == "slimmable" or "on rank 1" in first  # whose losses are means over the ranks when they are looked at


def test_accuracies_are_those_of_all_samples(both: tuple[Any, Any]) -> None:
    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    for found in both:
        assert found["measured"][0] == pytest.approx([float(F.cross_entropy(x, y)), 2 / 3])
        assert found["measured"][1] == pytest.approx([float(F.cross_entropy(x[0::2], y[0::2])), 0.5])


def test_alone() -> None:
    model = nn.Linear(2, 2)
    value = torch.ones(2)
    assert current() == ranks_of(model) == ALONE and ALONE.main and ALONE.alone
    assert ALONE.wrapped(model) is model and ALONE.total(value) is value and ALONE.means([value])[0] is value
    assert ALONE.from_main(lambda a: a + 1, 2) == 3 and ALONE.gathered(4) == [4] and ALONE.largest(1, 2) == (1, 2)
    with joined() as ranks:
        assert ranks == ALONE


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"batch_size": 10}, Ranks(0, 4), "batch_size: 10 samples, those of all processes, cannot be shared equally by 4"),
        ({"sync_bn": True}, Ranks(0, 2), "sync_bn: torch synchronises normalisations on CUDA GPUs only"),
        ({"sync_bn": True}, ALONE, "sync_bn: torch synchronises normalisations on CUDA GPUs only"),
    ],
)
def test_what_processes_cannot_do_together(options: dict[str, Any], ranks: Ranks, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check(RunOptions(device="cpu", **options), ranks)


@pytest.mark.parametrize(("device", "local"), [("cuda:0", 0), ("cuda", 2)])
def test_every_process_needs_a_gpu(device: str, local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(BackendError, match="every process needs a GPU of its own"):
        check(RunOptions(device=device), Ranks(local, 4, local))
    assert check(RunOptions(device="cuda"), Ranks(1, 2, 1)) == torch.device("cuda:0")
    with pytest.raises(BackendError, match="cuda_graph: the exchange between processes cannot be recorded"):
        check(RunOptions(device="cuda", cuda_graph=True), Ranks(1, 2, 1))


def test_norms_are_synchronised_meanwhile() -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm1d(3), Own(2))
    seen: list[Any] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    x = torch.randn(4, 2, 3, 3)
    names, before = list(model.state_dict()), model[1].eval()(x)
    with synchronised(model):
        assert [type(m) for m in model[1:]] == [nn.SyncBatchNorm, nn.SyncBatchNorm, Own]
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model[1](x), before)
    assert [type(m) for m in model[1:]] == [nn.BatchNorm2d, nn.BatchNorm1d, Own] and not hasattr(model[1], "process_group")
    assert seen == [nn.BatchNorm2d, nn.SyncBatchNorm]
    with synchronised(model, on=False):
        assert type(model[1]) is nn.BatchNorm2d


if __name__ == "__main__":
    warnings.simplefilter("error")
    be_one_of_two(work)
