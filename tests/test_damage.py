"""Images that cannot be read: how many there were, in which part, is in the result of a run, however often it was cut short."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import Killed, Watcher, outcome, small_network
from torch import nn

from qprune.options import RunOptions
from qprune.report import write_report
from qprune.resume.checkpoints import Checkpoints
from qprune.seeds import run
from qprune.tasks import data, models
from qprune.tasks.damage import NAMED, Damage
from tests import vision_standin
from tests.image_files import damage, tree
from tests.test_disk import command

FOUND = {
    "train": {"count": 4, "names": ["train/ash/1.png", "train/birch/2.png", "train/cedar/3.png", "train/cedar/4.png"]},
    "val": {"count": 1, "names": ["val/ash/0.png"]},
}


def network(*args: Any) -> nn.Module:
    net = small_network()
    net.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
    return net


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.install(monkeypatch)
    monkeypatch.setattr(models, "for_task", network)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tree(tmp_path / "images", train=10, val=3, test=3)
    damage(root)
    (root / "val" / "ash" / "0.png").write_bytes(b"")
    return root


def options(root: Path, **changes: Any) -> RunOptions:
    values: dict[str, Any] = {"data": "imagefolder", "data_dir": str(root), "data_options": {"image_size": 16, "workers": 0}}
    values |= {"float_epochs": 1, "search_epochs": 1, "finetune_epochs": 1, "batch_size": 10, "budget": "w4a4", "w_bits": (2, 4)}
    return RunOptions(**{**values, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_told_apart(images: Path, workers: int) -> None:
    task = data.load("imagefolder", directory=images, image_size=16, workers=workers)
    for part in ("train", *task.train_halves(0), "val", "test", "train"):
        list(task.loader(part, 4, torch.Generator()))
    found = task.train.damage
    assert found is task.test.damage and found.summary() == FOUND
    assert found.names["val/ash/0.png"].startswith("not an image in one of the formats")


def test_shares_of_one_folder(tmp_path: Path) -> None:
    task = data.load("imagefolder", directory=tree(tmp_path, all=10), image_size=16, workers=0)
    chosen = {"train": task.train.index[3:7], "val": task.val.index[:1], "test": task.test.index[1:3]}
    names = {part: sorted(task.train.reader.name(int(index)) for index in indices) for part, indices in chosen.items()}
    for name in itertools.chain(*names.values()):
        (tmp_path / name).write_bytes(b"")
    for part in ("train", "val", "test"):
        list(task.loader(part, 4))
    assert task.train.damage.summary() == {part: {"count": len(of), "names": of} for part, of in names.items()}


def test_only_the_first_are_named() -> None:
    found = Damage(10)
    for number in range(NAMED + 2):
        found.add(f"{number}.png", "empty", "train")
    assert found.summary() == {"train": {"count": NAMED + 2, "names": [f"{number}.png" for number in range(NAMED)]}}


def test_ranks_count_together() -> None:
    first, second = Damage(3), Damage(3)
    first.add("a.png", "empty", "train")
    first.add("b.png", "empty", "val")
    second.add("b.png", "empty", "val")
    second.add("c.png", "empty", "val")
    states = [first.state_dict(), second.state_dict()]
    for found in (first, second):
        found.join(states)
        assert found.summary() == {"train": {"count": 1, "names": ["a.png"]}, "val": {"count": 2, "names": ["b.png", "c.png"]}}
    with pytest.raises(data.DataError, match="damaged images: 4, allowed: 3"):
        first.join([{"names": {"d.png": "empty"}, "parts": {"d.png": "test"}}])


def test_a_result_tells_of_them(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, watcher = options(images, seeds=2, batch_size=4), Watcher()
    whole = run(chosen, tmp_path / "whole", watcher)
    assert [entry["damaged_images"] for entry in whole["runs"]] == [FOUND, FOUND]
    page = (tmp_path / "whole" / "report.html").read_text()
    first = "Images left out, as they could not be read: 4 of train (train/ash/1.png, train/birch/2.png, train/cedar/3.png, "
    assert f"{first}train/cedar/4.png); 1 of val (val/ash/0.png)." in page
    # before the last step of either seed: what is left reads few of the training images
    steps = watcher.steps // 2
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: self.steps == steps - 1))
    for last in (steps, steps + 1):
        with pytest.raises(Killed):
            run(chosen, tmp_path / "parts", Watcher(last), resume=True)
    run(chosen, tmp_path / "parts", Watcher(), resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_report_of_runs_that_differ(images: Path, tmp_path: Path) -> None:
    result = run(options(images), tmp_path, Watcher())
    names = [f"train/<b>{number}" for number in range(5)]
    entry = {**result["runs"][0], "damaged_images": {"train": {"count": 7, "names": names}}}
    (tmp_path / "result.json").write_text(json.dumps({**result, "runs": [entry, result["runs"][0]]}))
    page = write_report(tmp_path).read_text()
    assert "4 to 7 of train (train/&lt;b&gt;0, " in page and "train/&lt;b&gt;4, …); 1 of val (val/ash/0.png)." in page
    (tmp_path / "result.json").write_text(json.dumps({**result, "runs": [{**entry, "damaged_images": {}}]}))
    assert "could not be read" not in write_report(tmp_path).read_text()


def test_too_many_end_the_command(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = f"search --data imagefolder --data-dir {images} --data-option image_size=16 --data-option workers=0 --float-epochs 1"
    code, err = command(*words.split(), "--batch-size", "10", "--data-option", "max_damaged=3", "--out", str(tmp_path / "run"))
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith("qprune: damaged images: 4, allowed: 3 (option max_damaged); the last: ")
    skipped = [message for message in caplog.messages if message.startswith("skipped damaged image")]
    assert len(skipped) == 3 and all(f"image {number} of at most 3" in text for number, text in enumerate(skipped, 1))
