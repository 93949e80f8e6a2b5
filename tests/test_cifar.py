"""CIFAR's binary versions: reading, refusing, augmenting, and a whole small run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from qprune.cli import app
from qprune.tasks import cifar, data
from qprune.tasks.archive import MARGIN, read_members
from qprune.tasks.sources import Named, task_of
from tests import vision_standin
from tests.cifar_files import archive, contents10, member, records, write

FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


@pytest.fixture
def contents() -> dict[str, bytes]:
    return contents10()


def load(directory: Path, name: str = "cifar10", **options: Any) -> data.Task:
    return data.load(name, directory=directory, **{"complete": False, "augment": False, "workers": 0, **options})


def everything(task: data.Task, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(task.loader(part, 7))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def normalised(raw: np.ndarray) -> torch.Tensor:
    pixels = torch.tensor(raw.reshape(-1, 3, 32, 32)).double() / 255
    finish = cifar.CIFAR10.finish
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (finish.mean, finish.std))
    return ((pixels - mean) / std).float()


def images(x: torch.Tensor) -> list[bytes]:
    """The bytes that normalised images were made of, in an order of their own."""
    finish = cifar.CIFAR10.finish
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (finish.mean, finish.std))
    return sorted(image.numpy().tobytes() for image in ((x * std + mean) * 255).round().byte().contiguous())


@pytest.mark.parametrize("place", [FOLDER, "."])
def test_files_in_a_folder(tmp_path: Path, contents: dict[str, bytes], place: str) -> None:
    write(tmp_path / place, contents)
    task = load(tmp_path)
    assert (task.name, task.in_channels, task.image_size, task.num_classes) == ("cifar10", 3, 32, 10)
    raw = np.frombuffer(contents["test_batch.bin"], np.uint8).reshape(20, 3073)
    x, y = everything(task, "test")
    assert y.tolist() == raw[:, 0].tolist()
    assert torch.allclose(x, normalised(raw[:, 1:]), atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
    assert torch.equal(task.example(3), torch.cat([everything(task, "train")[0][:3]]))


def test_parts_hold_all_training_images_once(tmp_path: Path, contents: dict[str, bytes]) -> None:
    task = load(write(tmp_path, contents), val_fraction=0.2)
    raw = np.concatenate([np.frombuffer(contents[f"data_batch_{i}.bin"], np.uint8).reshape(20, 3073) for i in range(1, 6)])
    assert len(task.train) == 80 and len(task.val) == 20
    assert images(torch.cat([everything(task, part)[0] for part in ("train", "val")])) == sorted(row[1:].tobytes() for row in raw)
    assert everything(task, "val")[1].bincount().tolist() == [2] * 10
    other = data.load("cifar10", 1, directory=tmp_path, complete=False, augment=False)
    assert images(everything(task, "val")[0]) != images(everything(other, "val")[0])


def test_halves(tmp_path: Path, contents: dict[str, bytes]) -> None:
    task = load(write(tmp_path, contents))
    first, second = task.train_halves(seed=3)
    assert len(first) + len(second) == len(task.train) and abs(len(first) - len(second)) <= 10
    batches = list(task.loader(first, 16, torch.Generator()))
    assert sum(len(y) for _, y in batches) == len(first) == sum(len(y) for _, y in batches)


def test_cifar100_uses_fine_labels(tmp_path: Path) -> None:
    raw = {"train.bin": records(200, (20, 100), 0), "test.bin": records(100, (20, 100), 1)}
    write(tmp_path / "cifar-100-binary", {name: rows.tobytes() for name, rows in raw.items()})
    task = load(tmp_path, "cifar100")
    assert task.num_classes == 100
    assert everything(task, "test")[1].tolist() == raw["test.bin"][:, 1].tolist()


def test_an_archive_gives_what_its_folder_gives(tmp_path: Path, contents: dict[str, bytes]) -> None:
    extra = [(member(FOLDER, kind=tarfile.DIRTYPE), b""), (member(f"{FOLDER}/readme.html", 4), b"text")]
    packed = archive(tmp_path / "a" / ARCHIVE, contents, f"./{FOLDER}", extra)
    folder = write(tmp_path / "b", contents)
    first, second = load(packed.parent), load(folder)
    for part in ("train", "val", "test"):
        assert all(torch.equal(*pair) for pair in zip(everything(first, part), everything(second, part)))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param([(member("../outside", 1), b"x")], "points out of the archive", id="parent"),
        pytest.param([(member("/etc/passwd", 1), b"x")], "points out of the archive", id="absolute"),
        pytest.param([(member("a\\..\\b", 1), b"x")], "points out of the archive", id="backslash"),
        pytest.param([(member("link", kind=tarfile.SYMTYPE, target="/etc"), b"")], "is a link or a device", id="symlink"),
        pytest.param([(member("link", kind=tarfile.LNKTYPE, target="x"), b"")], "is a link or a device", id="hardlink"),
        pytest.param([(member("pipe", kind=tarfile.FIFOTYPE), b"")], "is a link or a device", id="fifo"),
        pytest.param([(member(f"{FOLDER}/test_batch.bin", 1), b"x")], "holds cifar-10-batches-bin/test_batch.bin twice", id="twice"),
        pytest.param(
            [(member(f"{FOLDER}/test_batch.bin", 30_730_001), bytes(30_730_001))], "has 30730001 bytes, at most 30730000", id="large"
        ),
        pytest.param([(member(f"x{i}"), b"") for i in range(101)], "has more than 100 members", id="many"),
    ],
)
def test_archives_that_are_refused(tmp_path: Path, contents: dict[str, bytes], extra: Any, message: str) -> None:
    archive(tmp_path / ARCHIVE, contents, FOLDER, extra)
    with pytest.raises(data.DataError, match=message):
        load(tmp_path)


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    path = archive(tmp_path / ARCHIVE, {"wanted": b"12345"}, "a", [(member("padding", 2 * MARGIN), bytes(2 * MARGIN))])
    assert path.stat().st_size < 10_000
    with pytest.raises(data.DataError, match="unpacks to far more than the data set has"):
        read_members(path, {"a/wanted": 5})
    archive(path, {"wanted": b"12345"}, "a", [(member("padding", MARGIN // 2), bytes(MARGIN // 2))])
    assert read_members(path, {"a/wanted": 5}) == {"a/wanted": b"12345"}


def test_damaged_archives(tmp_path: Path, contents: dict[str, bytes]) -> None:
    path = archive(tmp_path / ARCHIVE, contents, FOLDER)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w"):
        pass
    for content in (
        whole[: len(whole) // 2],
        whole[:30],
        bytes(flipped),
        b"",
        b"not an archive at all",
        gzip.compress(b"no tar"),
        plain.getvalue(),
    ):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=ARCHIVE):
            load(tmp_path)


def test_an_archive_that_lacks_a_file(tmp_path: Path, contents: dict[str, bytes]) -> None:
    contents.pop("data_batch_3.bin")
    archive(tmp_path / ARCHIVE, contents, FOLDER)
    with pytest.raises(data.DataError, match=r"lacks cifar-10-batches-bin/data_batch_3.bin"):
        load(tmp_path)


def test_md5(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / ARCHIVE, contents, FOLDER)
    with pytest.raises(data.DataError, match=f"has MD5 {hashlib.md5(path.read_bytes()).hexdigest()}, expected {cifar.CIFAR10.md5}"):
        load(tmp_path, verify=True)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"data": 1}))
    with pytest.raises(data.DataError, match=r"a pickle, which can run code and is not opened; put the binary version, cifar-10"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda b: b[:-1], "data_batch_2.bin has 61459 bytes, which are not records of 3073", id="cut"),
        pytest.param(lambda b: b"", "data_batch_2.bin has 0 bytes, which are not records", id="empty"),
        pytest.param(lambda b: b[: 5 * 3073] + bytes([10]) + b[5 * 3073 + 1 :], "record 5 of data_batch_2.bin has label 10", id="label"),
        pytest.param(lambda b: b + bytes(3073 * 10_000), "data_batch_2.bin has 30791460 bytes, at most 30730000 expected", id="long"),
    ],
)
def test_damaged_files(tmp_path: Path, contents: dict[str, bytes], change: Any, message: str) -> None:
    write(tmp_path, {**contents, "data_batch_2.bin": change(contents["data_batch_2.bin"])})
    with pytest.raises(data.DataError, match=message):
        load(tmp_path)


def test_files_that_are_not_there(tmp_path: Path, contents: dict[str, bytes]) -> None:
    with pytest.raises(data.DataError, match=r"holds neither cifar-10-binary.tar.gz nor cifar-10-batches-bin; .* --data-dir"):
        load(tmp_path)
    contents.pop("test_batch.bin")
    with pytest.raises(data.DataError, match=r"test_batch.bin cannot be read: No such file"):
        load(write(tmp_path, contents))


def test_too_few_records(tmp_path: Path, contents: dict[str, bytes]) -> None:
    with pytest.raises(data.DataError, match=r"data_batch_1.bin has 20 records, expected 10000; option complete=false"):
        load(write(tmp_path, contents), complete=True)


def test_options(tmp_path: Path, contents: dict[str, bytes]) -> None:
    write(tmp_path, contents)
    with pytest.raises(data.DataError, match="'cifar10' has no option colour; its options: directory, val_fraction, augment"):
        load(tmp_path, colour=True)
    with pytest.raises(data.DataError, match="val_fraction must be between 0 and 1, got 1"):
        load(tmp_path, val_fraction=1)
    with pytest.raises(data.DataError, match="workers must be a number of processes from 0 to 256, got -1"):
        load(tmp_path, workers=-1)
    for name, value, expected in [
        ("workers", "two", "a whole number or nothing"),
        ("workers", True, "a whole number or nothing"),
        ("augment", "yes", "true or false"),
        ("val_fraction", [0.1], "a number"),
        ("complete", 1, "true or false"),
    ]:
        with pytest.raises(data.DataError, match=rf"data set 'cifar10', option {name}: expected {expected}, got "):
            load(tmp_path, **{name: value})
    with pytest.raises(data.DataError, match="option directory: expected a name, got 5"):
        data.load("cifar10", directory=5)
    with pytest.raises(data.DataError, match="option seed: expected a whole number, got 'one'"):
        load(tmp_path, seed="one")
    with pytest.raises(data.DataError, match="'cifar10' has no option name"):
        task_of(Named("cifar10", data_options={"name": 1}))


@pytest.fixture
def augmented(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    vision_standin.install(monkeypatch)
    return write(tmp_path, contents)


def passes(task: data.Task, count: int = 1, seed: int = 0, **options: Any) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    loader = task.loader("train", 16, torch.Generator().manual_seed(seed), **options)
    return [list(loader) for _ in range(count)]


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second))


def test_augmented_images_are_shifted_crops_of_their_own(augmented: Path) -> None:
    task = load(augmented, augment=True)
    order = torch.Generator().manual_seed(0)
    plain = list(task.loader("train", 16, order, augment=False))
    changed = 0
    for (x, y), (original, labels) in zip(passes(task)[0], plain):
        assert torch.equal(y, labels)
        black = cifar.CIFAR10.finish(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
        wide = (torch.nn.functional.pad(original - black, [4] * 4) + black).contiguous()
        crops = [wide[:, :, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        candidates = torch.stack([*crops, *(crop.flip(-1) for crop in crops)])
        match = (candidates - x).abs().amax((2, 3, 4)) < 1e-5
        assert match.any(0).all()
        changed += int((~match[4 * 9 + 4]).sum())
    assert changed > 0.9 * len(task.train)


def test_passes_depend_on_the_seed_alone(augmented: Path) -> None:
    task = load(augmented, augment=True)
    torch.manual_seed(1)
    first = passes(task, 2)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))  # the global generator is as it was
    torch.manual_seed(2)
    again = passes(load(augmented, augment=True, workers=2), 2)
    assert same(first[0], again[0]) and same(first[1], again[1])
    assert not same(first[0], first[1]) and not same(first[0], passes(task, seed=1)[0])


def test_going_on_within_a_pass(augmented: Path) -> None:
    task = load(augmented, augment=True)
    generator = torch.Generator().manual_seed(0)
    loader = task.loader("train", 16, generator)
    assert isinstance(loader, data.ImageLoader)
    rest = list(loader.following(2))
    whole = passes(task, 2)
    assert same(rest, whole[0][2:])
    assert same(list(loader), whole[1])


def test_shards_are_parts_of_the_same_pass(augmented: Path) -> None:
    task = load(augmented, augment=True)
    shards = [passes(task, shard=(rank, 2))[0] for rank in range(2)]
    whole = torch.cat([x for x, _ in passes(task)[0]])
    for rank, shard in enumerate(shards):
        assert torch.equal(torch.cat([x for x, _ in shard]), whole[rank::2])


def test_without_torchvision(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.remove(monkeypatch)
    write(tmp_path, contents)
    with pytest.raises(data.DataError, match=r"option augment=false goes without\) needs torchvision.*pip install 'qprune\[vision\]'"):
        load(tmp_path, augment=True)
    task = load(tmp_path)
    plain, shuffled = everything(task, "train")[0], torch.cat([x for x, _ in passes(task)[0]])
    assert images(plain) == images(shuffled)


def test_search(augmented: Path, tmp_path: Path) -> None:
    command = f"search --data cifar10 --data-dir {augmented} --data-option complete=false --data-option workers=0 --model lenet5"
    command += f" --float-epochs 1 --search-epochs 1 --finetune-epochs 1 --batch-size 32 --out {tmp_path / 'run'}"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["options"]["data_dir"] == str(augmented)
    assert result["options"]["data_options"] == {"complete": False, "workers": 0}
    assert 0 <= result["summary"]["searched"]["accuracy_mean"] <= 1
