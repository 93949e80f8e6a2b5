"""Data, networks and weights from elsewhere: functions of one's own, loaders, libraries, files."""

from __future__ import annotations

import pickle
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset
from typer.testing import CliRunner

from qprune.cli import app
from qprune.compare.options import CompareOptions
from qprune.options import OptionError, RunOptions
from qprune.study.options import StudyOptions
from qprune.tasks import data, models
from qprune.tasks.loaders import of_loaders
from qprune.tasks.sources import Named, network_of, task_of
from qprune.tasks.weights import WeightsError, load_weights
from tests import vision_standin

MODULE = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from qprune.tasks.data import Split, Task

    def split(count, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(count) % 3
        return Split(torch.randn(count, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1), y)

    def task(seed=0, *, count=60):
        return Task("mine", 1, 8, 3, split(count, seed), split(12, seed + 1), split(12, seed + 2))

    def loaders(seed, batch_size=10):
        parts = [TensorDataset(*split(60, seed)[:]), TensorDataset(*split(12, 1)[:]), TensorDataset(*split(12, 2)[:])]
        return [DataLoader(part, batch_size, shuffle=index == 0) for index, part in enumerate(parts)]

    def net(num_classes, in_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, num_classes),
        )

    class Nested:
        make = staticmethod(lambda num_classes: nn.Linear(2, num_classes))

    def demanding(colour): ...
    def positional(seed, /): ...
    def number(): return 5
    constant = 5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, with a module own_sources."""
    (tmp_path / "own_sources.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_sources.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_sources", "broken_sources"):
        sys.modules.pop(name, None)


def test_a_task_of_ones_own(mine: Path) -> None:
    task = data.load("own_sources:task", 5, count=30)
    assert (task.name, task.num_classes, len(task.train)) == ("mine", 3, 30)
    assert torch.equal(task.example(2), data.load("own_sources:task", 5).example(2))
    assert not torch.equal(task.example(2), data.load("own_sources:task", 6).example(2))


def test_the_batch_size_is_given_to_functions_that_take_it(mine: Path) -> None:
    for options, size in [({}, 20), ({"batch_size": 15}, 15)]:
        task = task_of(Named("own_sources:loaders", data_options={"num_classes": 3, **options}, batch_size=20))
        assert len(next(iter(task.loader("train", 64)))[1]) == size
    assert len(data.load("own_sources:loaders", num_classes=3).loader("train", 64)) == 6
    assert task_of(Named("own_sources:task", batch_size=20)).num_classes == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_sources:taks", {}, r"own_sources:taks: own_sources has no 'taks'; did you mean task\?"),
        ("own_sources:constant.high", {}, "own_sources has no 'constant.high'"),
        ("own_sources:constant", {}, "'constant' is int, not a function"),
        ("own_sources:demanding", {}, "own_sources:demanding must be given colour; what it can be given by name is seed"),
        ("own_sources:positional", {}, "own_sources:positional must be given seed"),
        ("own_sources:task", {"colour": 1}, "own_sources:task takes no colour; it takes seed, count"),
        ("own_sources:number", {}, "own_sources:number returned int; expected a qprune.tasks.data.Task, or loaders"),
        ("no_such_module:task", {}, "there is no module 'no_such_module' in "),
        ("own_sources.inner:task", {}, "there is no module 'own_sources.inner'"),
        ("own_sources.py:task", {}, "write own_sources:task"),
        ("own_sources:loaders", {}, "the number of classes is unknown; give --data-option num_classes=N"),
        ("own_sources", {}, "unknown data set 'own_sources'; known: digits, .*module:function"),
        ("own-sources:task", {}, "unknown data set"),
        ("own_sources:task()", {}, "unknown data set"),
        ("../own_sources:task", {}, "unknown data set"),
    ],
)
def test_data_that_cannot_be_had(mine: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        data.load(name, **options)


def test_what_a_module_itself_cannot_import_is_not_hidden(mine: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        data.load("broken_sources:task")


def tensors(count: int = 40, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, 6, 6, generator=generator), torch.arange(count) % 4)


class Noisy(TensorDataset):
    """Draws from the global generator, as augmentations do."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn_like(x), y


def wrapped(train: Any, num_classes: int | None = 4) -> data.Task:
    return of_loaders("mine", (train, DataLoader(tensors(8, 1), 4), DataLoader(tensors(8, 2), 4)), num_classes)


def passes(task: data.Task, seed: int, count: int = 2) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    loader = task.loader("train", 64, torch.Generator().manual_seed(seed))
    return [list(loader) for _ in range(count)]


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second))


def test_loaders_give_their_own_batches() -> None:
    task = wrapped(DataLoader(tensors(), 16))
    assert (task.in_channels, task.image_size, task.num_classes, len(task.train)) == (3, 6, 4, 40)
    drawn = passes(task, 0)[0]
    assert [len(y) for _, y in drawn] == [16, 16, 8] and len(task.loader("train", 64)) == 3
    assert torch.equal(torch.cat([x for x, _ in drawn]), tensors().tensors[0])
    assert drawn[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(task.example(3), tensors().tensors[0][:3])


def test_loaders_by_name() -> None:
    loaders = {part: DataLoader(tensors(8, seed), 4) for seed, part in enumerate(("test", "train", "val"))}
    task = of_loaders("mine", loaders, 4)
    assert torch.equal(task.example(8), tensors(8, 1).tensors[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own_generator", [False, True])
def test_passes_of_loaders_depend_on_the_seed_alone(workers: int, own_generator: bool) -> None:
    def task() -> data.Task:
        generator = torch.Generator().manual_seed(99) if own_generator else None
        return wrapped(DataLoader(Noisy(*tensors().tensors), 16, shuffle=True, num_workers=workers, generator=generator))

    torch.manual_seed(1)
    first = passes(task(), 3)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(()))
    torch.manual_seed(2)
    again = passes(task(), 3)
    assert same(first[0], again[0]) and same(first[1], again[1])
    assert not same(first[0], first[1]) and not same(first[0], passes(task(), 4)[0])


def test_training_between_batches_does_not_change_them() -> None:
    task = wrapped(DataLoader(Noisy(*tensors().tensors), 16, shuffle=True))
    calm = passes(task, 0, 1)[0]
    disturbed = []
    for batch in task.loader("train", 16, torch.Generator().manual_seed(0)):
        torch.rand(17)
        disturbed.append(batch)
    assert same(calm, disturbed)


class Labelled(TensorDataset):
    @property
    def targets(self) -> list[int]:
        return self.tensors[1].tolist()

    classes = ("a", "b", "c", "d")


@pytest.mark.parametrize("kind", [TensorDataset, Labelled])
def test_halves_of_a_loader(kind: type[TensorDataset]) -> None:
    dataset = kind(torch.arange(40.0).view(40, 1, 1, 1), torch.arange(40) % 4)
    halves = wrapped(DataLoader(dataset, 8, shuffle=True)).train_halves(seed=2)
    found = [[(x, y) for x, y in half.loader(8, torch.Generator(), None, False, (0, 1))] for half in halves]
    images = [set(torch.cat([x for x, _ in half]).flatten().tolist()) for half in found]
    assert len(images[0]) == len(images[1]) == 20 and not images[0] & images[1]
    if kind is Labelled:
        assert all(torch.cat([y for _, y in half]).bincount().tolist() == [5] * 4 for half in found)


def test_loaders_that_cannot_be_divided() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(tensors())

        def __len__(self) -> int:
            return 40

    task = wrapped([(torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(data.DataError, match=r"mine, train: this method trains on parts of the training data, and list cannot be divided"):
        task.train_halves()
    with pytest.raises(data.DataError, match="DataLoader cannot be divided"):
        wrapped(DataLoader(Stream(), 4)).train_halves()


class Streamed(list[tuple[torch.Tensor, torch.Tensor]]):
    """Batches that are no DataLoader's."""


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "workers", "streamed", "distributed"])
def test_loaders_of_one_s_own_are_shared(kind: str) -> None:
    everything = tensors()
    if kind == "streamed":
        loader: Any = Streamed(tuple(batch) for batch in DataLoader(everything, 6))
    elif kind == "distributed":
        loader = None
    else:
        own = torch.Generator() if kind == "own generator" else None
        loader = DataLoader(everything, 6, shuffle=True, generator=own, num_workers=2 if kind == "workers" else 0)

    def shard(rank: int, ranks: int, part: str = "train") -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        sampled = DataLoader(everything, 6 // ranks, sampler=DistributedSampler(everything, ranks, rank)) if loader is None else loader
        passes = wrapped(sampled).loader(part, 6, torch.Generator().manual_seed(5) if part == "train" else None, shard=(rank, ranks))
        return [list(passes), list(passes)]

    for whole, first, second in zip(shard(0, 1), shard(0, 2), shard(1, 2), strict=True):
        assert len(whole) == len(first) == len(second)
        for (x, _), (left, _), (right, _) in zip(whole, first, second, strict=True):
            assert torch.equal(x[0::2], left) and torch.equal(x[1::2], right)


def test_plain_passes_over_shared_loaders_leave_nothing_out() -> None:
    task = wrapped(DataLoader(tensors(), 4))
    plain = [[len(y) for _, y in task.loader("val", 4, shard=(rank, 3))] for rank in range(3)]
    assert plain == [[2, 2], [1, 1], [1, 1]]


def test_the_number_of_classes_is_that_of_the_dataset() -> None:
    assert wrapped(DataLoader(Subset(Labelled(*tensors().tensors), range(8)), 4), None).num_classes == 4
    with pytest.raises(data.DataError, match="the number of classes is unknown"):
        wrapped(DataLoader(tensors(), 4), None)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (torch.zeros(2, 3, 6, 6), r"float32 \[2, 3, 6, 6\]"),
        ((torch.zeros(2, 3, 6, 6), torch.zeros(2)), r"\(float32 \[2, 3, 6, 6\], float32 \[2\]\)"),
        ((torch.zeros(2, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)), "uint8"),
        ((torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)), r"float32 \[2, 6\]"),
        ((torch.zeros(2, 3, 6, 6), torch.zeros(3, dtype=torch.int64)), r"int64 \[3\]"),
        ({"x": 1}, "dict"),
    ],
)
def test_batches_of_another_form(batch: Any, described: str) -> None:
    with pytest.raises(data.DataError, match=rf"mine, train: a batch is .*{described}.*; expected"):
        wrapped([batch])


@pytest.mark.parametrize("made", [None, (1, 2, 3), [DataLoader(tensors(), 4)] * 2, {"train": DataLoader(tensors(), 4)}, "abc"])
def test_what_is_no_three_loaders(made: Any) -> None:
    with pytest.raises(data.DataError, match=r"expected a qprune.tasks.data.Task, or loaders \(train, val, test\)"):
        of_loaders("mine", made, 4)


TASK = Named("synthetic", data_options={"image_size": 8, "train": 8, "val": 8, "test": 8, "num_classes": 3})


def test_networks_of_ones_own(mine: Path) -> None:
    task = task_of(TASK)
    net = models.for_task("own_sources:net", task)
    assert net(task.example()).shape == (2, 3)
    linear = models.for_task("own_sources:Nested.make", task)
    assert isinstance(linear, nn.Linear) and linear.out_features == 3
    for name, message in [
        ("own_sources:nett", "did you mean net"),
        ("own_sources:number", "own_sources:number returned int, expected a torch.nn.Module"),
        ("own_sources:demanding", "must be given colour; what it can be given by name is num_classes, in_channels, image_size"),
        ("resnet21", "unknown model 'resnet21'; known models: resnet8, .*torchvision:name, timm:name, module:function"),
    ]:
        with pytest.raises(models.ModelError, match=message):
            models.for_task(name, task)


def test_networks_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.install(monkeypatch)
    task = task_of(TASK)
    assert models.for_task("torchvision:small_net", task)(task.example()).shape == (2, 3)
    with pytest.raises(models.ModelError, match="unknown model 'torchvision:smal_net'; did you mean small_net"):
        models.for_task("torchvision:smal_net", task)
    with pytest.raises(models.ModelError, match="takes images of 3 channels, the data has 1"):
        models.for_task("torchvision:small_net", data.load("synthetic", in_channels=1))
    vision_standin.remove(monkeypatch)
    with pytest.raises(models.ModelError, match=r"torchvision cannot be imported .*pip install 'qprune\[vision\]'"):
        models.for_task("torchvision:small_net", task)


def test_networks_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        assert (name, pretrained, in_chans) == ("small_net.a1", False, 3)
        return vision_standin.small_net(num_classes)

    standin: Any = types.ModuleType("timm")
    standin.create_model, standin.list_models = create_model, lambda: ["small_net"]
    monkeypatch.setitem(sys.modules, "timm", standin)
    task = task_of(TASK)
    assert models.for_task("timm:small_net.a1", task)(task.example()).shape == (2, 3)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(models.ModelError, match=r"timm cannot be imported .*pip install 'timm'"):
        models.for_task("timm:small_net", task)


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def filled(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return net().state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda t: t, id="plain"),
        pytest.param(lambda t: {"state_dict": t, "epoch": 3, "best": 0.5}, id="state_dict"),
        pytest.param(lambda t: {"model": t, "args": {"lr": 0.1}}, id="model"),
        pytest.param(lambda t: {f"module.{k}": v for k, v in t.items()}, id="module"),
        pytest.param(lambda t: {f"module._orig_mod.{k}": v for k, v in t.items()}, id="compiled"),
        pytest.param(lambda t: {k: v for k, v in t.items() if not k.endswith("num_batches_tracked")}, id="old"),
    ],
)
def test_weights_of_torch_save(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(filled()), tmp_path / "w.pth")
    model = net()
    load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, filled()[name]) for name, value in model.state_dict().items())


def test_weights_of_safetensors(tmp_path: Path) -> None:
    save_file(filled(), tmp_path / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[3].weight, filled()["3.weight"])


class Harmful:
    def __reduce__(self) -> Any:
        return (Path("harm").touch, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            {"a": Harmful()}, "or holds more than tensors and plain values, which is not opened because it could run code", id="code"
        ),
        pytest.param({"epoch": 3}, "does not hold a state_dict, alone or under one of the names state_dict, model", id="no tensors"),
        pytest.param([torch.zeros(3)], "does not hold a state_dict", id="list"),
        pytest.param({}, "does not hold a state_dict", id="empty"),
    ],
)
def test_files_of_torch_save_that_are_refused(mine: Path, content: Any, message: str) -> None:
    torch.save(content, "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(net(), "w.pth")
    assert not Path("harm").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(filled(), path) if suffix == ".pth" else save_file(filled(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"nothing of the kind", pickle.dumps({"a": 1})[:-3]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=path.name):
            load_weights(net(), path)
    with pytest.raises(WeightsError, match="there is no file"):
        load_weights(net(), tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("0.bias"), r"is not of this network: it lacks 0.bias", id="lacks"),
        pytest.param(lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(7)}), r"it has x0, x1, x2, x3, x4 and 2 more", id="has"),
        pytest.param(
            lambda t: t.update({"3.weight": torch.zeros(10, 4)}), r"3.weight \[10, 4\], here \[3, 4\]; is it for another number", id="shape"
        ),
        pytest.param(lambda t: t["0.weight"].fill_(torch.nan), r"0.weight has values that are not finite", id="nan"),
    ],
)
def test_weights_of_another_network_change_nothing(tmp_path: Path, change: Any, message: str) -> None:
    tensors = filled()
    change(tensors)
    torch.save(tensors, tmp_path / "w.pth")
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_begins_with_its_weights(mine: Path) -> None:
    task = task_of(TASK)
    torch.save(models.for_task("own_sources:net", task).state_dict(), "w.pth")
    made = network_of(Named(model="own_sources:net", weights="w.pth"), task)
    assert torch.equal(made.state_dict()["0.weight"], torch.load("w.pth", weights_only=True)["0.weight"])


def test_options_record_where_things_come_from() -> None:
    values = {"data": "a.b:c", "model": "timm:d", "data_dir": "/e", "data_options": {"f": 1}, "weights": "g.pth"}
    for kind in (RunOptions, StudyOptions, CompareOptions):
        written = yaml.safe_load(yaml.safe_dump(kind(**values).as_dict()))
        assert {name: written[name] for name in values} == values
    for kind in (StudyOptions, CompareOptions):
        assert "weights" not in kind().as_dict()


@pytest.mark.parametrize("kind", [RunOptions, StudyOptions, CompareOptions])
def test_options_that_are_refused(kind: Any) -> None:
    with pytest.raises(OptionError, match=r"data: 'nope' is unknown; expected one of digits, .*module:function"):
        kind(data="nope")
    with pytest.raises(OptionError, match=r"model: 'a b:c' is unknown; expected one of resnet8, .*timm:name, module:function"):
        kind(model="a b:c")
    for name, value, expected in [("data", 3, "a name"), ("weights", None, "a name"), ("data_options", [1], "names and values")]:
        with pytest.raises(OptionError, match=f"{name}: expected {expected}, got "):
            kind(**{name: value})
    with pytest.raises(OptionError, match="float_epochs must be positive, got 0"):
        kind(float_epochs=0)


def test_on_the_command_line(mine: Path) -> None:
    runner = CliRunner()
    command = "train --data own_sources:task --data-option count=45 --model own_sources:net --epochs 1 --out float"
    trained = runner.invoke(app, command.split(" "))
    assert trained.exit_code == 0, trained.output
    command = "search --data own_sources:loaders --data-option num_classes=3 --model own_sources:net --weights float/model.safetensors"
    found = runner.invoke(app, f"{command} --float-epochs 0 --search-epochs 1 --finetune-epochs 1 --method darts --out run".split())
    assert found.exit_code == 0, found.output
    options = yaml.safe_load(Path("run/options.yaml").read_text())
    assert (options["data"], options["data_options"], options["weights"]) == (
        "own_sources:loaders",
        {"num_classes": 3},
        "float/model.safetensors",
    )
    assert "search time" not in found.output and Path("run/report.html").exists()
