"""Folders of images: parts, classes, decoding, damaged files, order and augmentation."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qprune.tasks import data, imagefolder
from tests import vision_standin
from tests.image_files import SHADES, damage, picture, tree

SIZE = 16


@pytest.fixture(autouse=True)
def _vision(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.install(monkeypatch)


def load(root: Path, **options: Any) -> data.Task:
    return data.load("imagefolder", directory=root, **{"image_size": SIZE, "workers": 0, **options})


def batches(task: data.Task, part: str, size: int = 4, seed: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(task.loader(part, size, generator))


def shades(x: torch.Tensor) -> list[str]:
    """The classes that the images show."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (imagefolder.IMAGENET.mean, imagefolder.IMAGENET.std))
    means = ((x * std + mean) * 255).mean((1, 2, 3))
    return [min(SHADES, key=lambda name: abs(SHADES[name] - float(value))) for value in means]


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second))


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        pytest.param({"train": 10, "val": 3, "test": 2}, (30, 9, 6), id="three"),
        pytest.param({"train": 10, "val": 3}, (27, 3, 9), id="val"),
        pytest.param({"train": 10, "test": 4}, (27, 3, 12), id="test"),
        pytest.param({"all": 10}, (24, 3, 3), id="none"),
    ],
)
def test_parts(tmp_path: Path, counts: dict[str, int], sizes: tuple[int, int, int]) -> None:
    task = load(tree(tmp_path, **counts))
    assert (task.in_channels, task.image_size, task.num_classes) == (3, SIZE, 3)
    assert (len(task.train), len(task.val), len(task.test)) == sizes
    for part in ("train", "val", "test"):
        for x, y in batches(task, part):
            assert x.shape[1:] == (3, SIZE, SIZE) and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
            assert shades(x) == [list(SHADES)[label] for label in y]
    for x, y in batches(task, "train", seed=0):
        assert shades(x) == [list(SHADES)[label] for label in y]


def test_val_is_the_final_part_only_if_there_is_no_test(tmp_path: Path) -> None:
    task = load(tree(tmp_path, train=10, val=3))
    names = [task.test.reader.name(int(index)) for index in task.test.index]
    assert all(name.startswith("val/") for name in names) and len(set(names)) == 9
    drawn = {task.val.reader.name(int(index)) for index in task.val.index}
    assert all(name.startswith("train/") for name in drawn)
    assert drawn != {p.reader.name(int(i)) for p in [data.load("imagefolder", 1, directory=tmp_path, image_size=SIZE).val] for i in p.index}


def test_normalisation(tmp_path: Path) -> None:
    task = load(tree(tmp_path, train=3, val=3), mean=[0.5, 0.5, 0.2], std=[0.5, 0.25, 1.0])
    Image.new("RGB", (SIZE, SIZE), (255, 0, 51)).save(tmp_path / "val" / "ash" / "0.png")
    x = batches(task, "test")[0][0][0]
    assert torch.allclose(x[:, 3, 5], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA", "I;16"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    tree(tmp_path, train=4, val=2)
    path = tmp_path / "val" / "cedar" / ("0.tif" if mode == "CMYK" else "0.png")
    if mode == "I;16":
        Image.fromarray(np.full((20, 20), 50_000, np.uint16)).save(path)
    else:
        picture(path, 255 if mode == "1" else SHADES["cedar"], mode=mode)
    task = load(tmp_path)
    assert sum(len(y) for _, y in batches(task, "test")) == len(task.test)
    assert not task.test.damage.names


def test_suffixes_links_and_nested_folders(tmp_path: Path) -> None:
    tree(tmp_path, train=4, val=2)
    picture(tmp_path / "train" / "ash" / "deeper" / "x.JPEG", SHADES["ash"])
    picture(tmp_path / "elsewhere" / "y.bmp", SHADES["ash"])
    (tmp_path / "train" / "ash" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "ash" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    task = load(tmp_path)
    assert len(task.train) + len(task.val) == 12 + 2 and task.num_classes == 3


def test_names_that_are_no_text(tmp_path: Path) -> None:
    tree(tmp_path, train=4, val=2)
    strange = os.fsdecode(b"\xff\xfe.png")
    picture(tmp_path / "val" / "ash" / "a.png", SHADES["ash"])
    (tmp_path / "val" / "ash" / "a.png").rename(tmp_path / "val" / "ash" / strange)
    assert sum(len(y) for _, y in batches(load(tmp_path), "test")) == 7


def test_damaged_images_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, train=10, val=2, test=2)
    damaged = damage(tmp_path)
    task = load(tmp_path, max_damaged=4)
    with caplog.at_level(logging.WARNING, "qprune"):
        plain = batches(task, "train")
        again = batches(task, "train")
    assert sum(len(y) for _, y in plain) == 26 and same(plain, again)
    assert set(task.train.damage.names) == set(damaged)
    assert len(caplog.messages) == 4 and all(sum(name in line for line in caplog.messages) == 1 for name in damaged)
    assert "not an image in one of the formats" in task.train.damage.names["train/cedar/4.png"]


def test_training_batches_stay_as_large(tmp_path: Path) -> None:
    tree(tmp_path, train=10, val=2, test=2)
    damage(tmp_path)
    task = load(tmp_path, max_damaged=4)
    drawn = batches(task, "train", 8, seed=1)
    assert [len(y) for _, y in drawn] == [8, 8, 8, 6]
    for x, y in drawn:
        assert shades(x) == [list(SHADES)[label] for label in y]
    assert same(drawn, batches(load(tmp_path, max_damaged=4, workers=2), "train", 8, seed=1))


def test_one_damaged_image_too_many(tmp_path: Path) -> None:
    tree(tmp_path, train=10, val=2, test=2)
    damage(tmp_path)
    task = load(tmp_path, max_damaged=3)
    with pytest.raises(
        data.DataError, match=r"damaged images: 4, allowed: 3 \(option max_damaged\); the last: .*cedar/4.png: not an image"
    ):
        batches(task, "train")
    with pytest.raises(data.DataError, match="damaged images: 1, allowed: 0"):
        batches(load(tmp_path, max_damaged=0, workers=1), "train", seed=0)


def test_damage_is_counted_once_over_all_parts(tmp_path: Path) -> None:
    tree(tmp_path, train=10, val=3)
    damage(tmp_path)
    task = load(tmp_path, max_damaged=4)
    first, second = task.train_halves(0)
    for part in (first, second, task.val, first):
        list(task.loader(part, 5, torch.Generator()))
    assert len(task.test.damage.names) == 4


def test_an_example_without_the_damaged(tmp_path: Path) -> None:
    tree(tmp_path, train=4, val=2, test=2)
    for number in range(3):
        (tmp_path / "train" / "ash" / f"{number}.png").write_bytes(b"")
    task = load(tmp_path)
    assert shades(task.example(2)) == ["ash", "birch"]


def test_more_pixels_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, train=4, val=2)
    monkeypatch.setattr(imagefolder, "MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(data.DataError, match="20 x 24 pixels are more than 479"):
        load(tmp_path, max_damaged=0).example()


def test_images_that_are_too_narrow(tmp_path: Path) -> None:
    tree(tmp_path, train=4, val=2)
    picture(tmp_path / "val" / "ash" / "0.png", SHADES["ash"], shape=(1, 101))
    picture(tmp_path / "val" / "ash" / "1.png", SHADES["ash"], shape=(100, 1))
    task = load(tmp_path)
    assert sum(len(y) for _, y in batches(task, "test")) == 5
    assert task.test.damage.names == {"val/ash/0.png": "101 x 1 pixels are too narrow; one side may be 100 x the other"}


def test_files_that_go_away(tmp_path: Path) -> None:
    task = load(tree(tmp_path, train=4, val=2), max_damaged=0)
    (tmp_path / "val" / "ash" / "0.png").unlink()
    with pytest.raises(data.DataError, match=r"val/ash/0.png: FileNotFoundError"):
        batches(task, "test")


def test_passes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    root = tree(tmp_path, train=10, val=2)
    first = batches(load(root), "train", seed=1)
    assert same(first, batches(load(root, workers=2), "train", seed=1))
    assert not same(first, batches(load(root), "train", seed=2))
    plain = load(root, augment=False)
    a, b = (list(plain.loader("train", 27, torch.Generator().manual_seed(0), augment=augment)) for augment in (True, False))
    assert same(a, b)


def test_workers_are_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = imagefolder.Files.image

    def interrupted(self: imagefolder.Files, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGINT)
        return read(self, index)

    task = load(tree(tmp_path, train=4, val=2), workers=1)
    monkeypatch.setattr(imagefolder.Files, "image", interrupted)
    assert sum(len(y) for _, y in batches(task, "train", seed=0)) == len(task.train)


def test_batches_on_a_device(tmp_path: Path) -> None:
    task = load(tree(tmp_path, train=4, val=2)).to("meta")
    for part in (task.train, task.train_halves()[0], task.test):
        assert all(x.device.type == y.device.type == "meta" for x, y in task.loader(part, 4, torch.Generator()))
    assert task.example().device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    task = load(tree(tmp_path, train=20, val=2), workers=1)
    here, there = batches(task, "train", seed=0), batches(task.to("cuda"), "train", seed=0)
    assert all(x.device.type == "cuda" for x, _ in there)
    assert all(torch.allclose(x, u.cpu(), atol=1e-6) and torch.equal(y, v.cpu()) for (x, y), (u, v) in zip(here, there, strict=True))


def remove_birch(root: Path) -> None:
    for file in (root / "train" / "birch").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        pytest.param(lambda r: (r / "val" / "oak").mkdir(), {}, r"val/oak is a class that .*train has not", id="class"),
        pytest.param(remove_birch, {}, r"train/birch holds no image; known names end in \.jpg", id="empty class"),
        pytest.param(lambda r: (r / "train").rename(r / "other"), {}, "has val, but no folder train", id="no train"),
        pytest.param(lambda r: (r / "val").rename(r / "other"), {}, "has train, but neither val nor test", id="train"),
        pytest.param(
            lambda r: None, {"image_size": 4}, "expected image_size from 8 to 4096 and max_damaged from 0, got 4 and 10", id="size"
        ),
        pytest.param(lambda r: None, {"max_damaged": -1}, "max_damaged from 0, got 16 and -1", id="limit"),
        pytest.param(lambda r: None, {"mean": [0.5]}, r"mean and std must be three numbers each", id="mean"),
        pytest.param(lambda r: None, {"mean": "dark"}, r"option mean: expected a list, each a number, got 'dark'", id="mean's type"),
        pytest.param(lambda r: None, {"std": [0.5, 0, 1]}, r"std positive, got", id="std"),
        pytest.param(lambda r: None, {"val_fraction": 0}, "val_fraction must be between 0 and 1, got 0", id="share"),
    ],
)
def test_folders_and_options_that_are_refused(tmp_path: Path, prepare: Any, options: dict[str, Any], message: str) -> None:
    prepare(tree(tmp_path, train=4, val=2))
    with pytest.raises(data.DataError, match=message):
        load(tmp_path, **options)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"nowhere cannot be read \(No such file or directory\); name the folder with --data-dir"):
        load(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"holds no class folders; expected folder/class/image.jpg"):
        load(tmp_path)


def test_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.remove(monkeypatch)
    with pytest.raises(data.DataError, match=r"imagefolder needs torchvision, which cannot be imported .*pip install 'qprune\[vision\]'"):
        load(tree(tmp_path, train=4, val=2))
