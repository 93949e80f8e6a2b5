"""Splits, batches and augmentation of the embedded data sets."""

from __future__ import annotations

import sys

import pytest
import torch

from qprune.kernels import QPruneError
from qprune.tasks import data
from qprune.tasks.digits import shift_rotate


@pytest.fixture(scope="module")
def task() -> data.Task:
    return data.load("digits", seed=0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(split: data.Split) -> set[tuple[float, ...]]:
    return {tuple(image.flatten().tolist()) for image in split.x}


def test_digits_shapes_and_scale(task: data.Task) -> None:
    assert (task.in_channels, task.image_size, task.num_classes) == (1, 16, 10)
    assert task.train.x.shape == (len(task.train), 1, 16, 16)
    assert task.train.x.dtype == torch.float32
    assert task.train.y.dtype == torch.int64
    assert len(task.train) + len(task.val) + len(task.test) == 1797
    assert abs(task.train.x.mean()) < 1e-4
    assert abs(task.train.x.std() - 1) < 1e-4


def test_digits_parts_are_disjoint_and_stratified(task: data.Task) -> None:
    parts = (task.train, task.val, task.test)
    assert sum(len(rows(part)) for part in parts) == len(rows(data.Split(torch.cat([part.x for part in parts]), task.train.y)))
    total = sum(part.y.bincount(minlength=10) for part in parts)
    for part, fraction in zip(parts, (0.6, 0.2, 0.2)):
        assert (part.y.bincount(minlength=10) - fraction * total).abs().max() <= 1


def test_digits_split_is_fixed_by_the_seed(task: data.Task) -> None:
    again, other = data.load("digits", seed=0), data.load("digits", seed=1)
    assert torch.equal(task.train.x, again.train.x)
    assert torch.equal(task.test.y, again.test.y)
    assert rows(task.test) != rows(other.test)


def test_train_halves(task: data.Task) -> None:
    first, second = task.train_halves(seed=5)
    assert len(first) + len(second) == len(task.train)
    assert not rows(first) & rows(second)
    assert (first.y.bincount() - second.y.bincount()).abs().max() <= 1
    assert torch.equal(first.x, task.train_halves(seed=5)[0].x)
    assert sum(len(y) for _, y in task.loader(first, 100, generator(0))) == len(first)


def test_augmentation(task: data.Task) -> None:
    x = task.train.x[:64]
    assert task.augment is not None
    out = task.augment(x, generator(0))
    assert out.shape == x.shape
    assert out.min() >= x.min() - 1e-5
    assert out.max() <= x.max() + 1e-5
    assert not torch.allclose(out, x)
    assert torch.equal(out, task.augment(x, generator(0)))
    assert not torch.equal(out, task.augment(x, generator(1)))


def test_augmentation_moves_at_most_as_far_as_it_says() -> None:
    x = torch.full((200, 1, 17, 17), -1.0)
    x[:, :, 8, 8] = 1.0
    still = shift_rotate(x, generator(0), background=-1.0, pixels=0, degrees=0)
    assert torch.allclose(still, x, atol=1e-5)
    moved = shift_rotate(x, generator(0), background=-1.0, pixels=2, degrees=0) + 1
    coordinates = torch.arange(17.0) - 8
    mass = moved.sum((1, 2, 3))
    for axis in (2, 3):
        centre = (moved.sum(5 - axis).squeeze(1) * coordinates).sum(1) / mass
        assert 1.8 < centre.abs().max() <= 2.001


def test_augmentation_turns_at_most_as_far_as_it_says() -> None:
    x = torch.zeros(200, 1, 33, 33)
    x[:, :, 15:18, 28:31] = 1.0
    turned = shift_rotate(x, generator(0), pixels=0, degrees=12)
    coordinates = torch.arange(33.0) - 16
    right = (turned.sum(2).squeeze(1) * coordinates).sum(1)
    down = (turned.sum(3).squeeze(1) * coordinates).sum(1)
    angle = torch.atan2(down, right).rad2deg()
    assert 11 < angle.max() <= 12.3
    assert -12.3 <= angle.min() < -11


def test_loader_in_order_without_a_generator(task: data.Task) -> None:
    loader = task.loader("val", 100)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [100, 100, 100, len(task.val) - 300]
    assert len(loader) == len(batches)
    assert torch.equal(torch.cat([x for x, _ in batches]), task.val.x)
    assert torch.equal(torch.cat([y for _, y in batches]), task.val.y)


def test_loader_shuffles_every_pass_and_repeats_with_the_seed(task: data.Task) -> None:
    source = generator(7)
    loader = task.loader("train", 64, source)
    first, second = ([x for x, _ in loader] for _ in range(2))
    assert not torch.equal(first[0], second[0])
    again = list(task.loader("train", 64, generator(7)))
    assert all(torch.equal(x, other) for x, (other, _) in zip(first, again))
    assert sorted(task.train.y.tolist()) == sorted(torch.cat([y for _, y in again]).tolist())


def test_leaving_a_pass_early_changes_nothing_later(task: data.Task) -> None:
    whole, broken = task.loader("train", 64, generator(3)), task.loader("train", 64, generator(3))
    list(whole)
    next(iter(broken))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, broken))


def test_only_training_parts_are_augmented(task: data.Task) -> None:
    batch, _ = next(iter(task.loader("val", len(task.val), generator(0))))
    assert torch.equal(batch.sum((1, 2, 3)).sort().values, task.val.x.sum((1, 2, 3)).sort().values)
    plain, _ = next(iter(task.loader("train", len(task.train), generator(0), augment=False)))
    assert torch.equal(plain.sum((1, 2, 3)).sort().values, task.train.x.sum((1, 2, 3)).sort().values)
    with pytest.raises(data.DataError, match="give the loader a generator"):
        task.loader("train", 8, augment=True)


@pytest.mark.parametrize("augment", [False, True])
def test_shards_share_the_batches_of_one_process(task: data.Task, augment: bool) -> None:
    part = data.Split(*task.train[torch.arange(200)])
    batches = list(task.loader(part, 51, generator(0), augment=augment))
    shards = [list(task.loader(part, 51, generator(0), augment=augment, shard=(rank, 3))) for rank in range(3)]
    assert [[len(y) for _, y in shard] for shard in shards] == [[17, 17, 17, 15]] * 3
    for number, (x, y) in enumerate(batches[:-1]):  # the last one has 47 samples for one process, 45 for three
        for rank, shard in enumerate(shards):
            assert torch.equal(shard[number][0], x[rank::3]) and torch.equal(shard[number][1], y[rank::3])
    with pytest.raises(data.DataError, match="batch_size: 50 samples cannot be shared equally by 3 ranks"):
        task.loader("train", 50, generator(0), shard=(0, 3))


def test_plain_shards_leave_no_sample_out(task: data.Task) -> None:
    part = data.Split(*task.val[torch.arange(10)])
    shards = [list(task.loader(part, 9, shard=(rank, 3))) for rank in range(3)]
    assert [[len(y) for _, y in shard] for shard in shards] == [[3, 1], [3], [3]]
    seen = torch.cat([x for shard in shards for x, _ in shard])
    assert torch.equal(seen.flatten(1).sum(1).sort().values, part.x.flatten(1).sum(1).sort().values)


def test_drop_last_keeps_full_batches_only(task: data.Task) -> None:
    loader = task.loader("train", 100, generator(0), drop_last=True)
    assert [len(y) for _, y in loader] == [100] * len(loader) == [100] * (len(task.train) // 100)
    with pytest.raises(data.DataError, match="no batch of 400 in 360 samples"):
        task.loader("val", 400, drop_last=True)


def test_splits_work_in_torch_data_loaders(task: data.Task) -> None:
    x, y = next(iter(torch.utils.data.DataLoader(task.val, batch_size=8)))
    assert x.shape == (8, 1, 16, 16)
    assert torch.equal(y, task.val.y[:8])


def test_synthetic() -> None:
    options = {"in_channels": 3, "image_size": 24, "num_classes": 5, "train": 20, "val": 8, "test": 8}
    task = data.load("synthetic", seed=2, **options)
    assert task.train.x.shape == (20, 3, 24, 24)
    assert set(task.train.y.tolist()) <= set(range(5))
    assert torch.equal(task.train.x, data.load("synthetic", seed=2, **options).train.x)
    assert not torch.equal(task.train.x, data.load("synthetic", seed=3, **options).train.x)
    batch, _ = next(iter(task.to("cpu").loader("train", 4, generator(0))))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_errors(task: data.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataError, match="unknown data set 'mnist'; known: digits, synthetic") as caught:
        data.load("mnist")
    assert isinstance(caught.value, QPruneError)
    with pytest.raises(data.DataError, match="'digits' has no option size; its options: fractions, image_size"):
        data.load("digits", size=3)
    with pytest.raises(data.DataError, match="unknown part 'dev' of digits; parts: train, val, test"):
        task.loader("dev", 8)
    with pytest.raises(data.DataError, match="sum to 1"):
        data.load("digits", fractions=(0.5, 0.4, 0.3))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match="pip install scikit-learn"):
        data.load("digits")
