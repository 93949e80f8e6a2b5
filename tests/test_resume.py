"""Runs that are cut short, and go on as if they had not been."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import METHODS, Killed, Watcher, options, outcome, patch

from qprune.errors import CheckpointError
from qprune.options import OptionError
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.statefile import read_state
from qprune.seeds import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Every phase collects garbage before it is measured: what was there before the tests need not be looked at."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    patch(monkeypatch)


def killed(folder: Path, at: int, **changes: Any) -> None:
    """A run with a checkpoint after every step, killed at step `at`, or killed again there."""
    with pytest.raises(Killed):
        run(options(**changes), folder, Watcher(at), resume=True, minutes=1e-9)


def resumed(folder: Path, **changes: Any) -> dict[str, Any]:
    run(options(**changes), folder, Watcher(), resume=True)
    return outcome(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        torch.set_num_threads(1)
        watcher = Watcher()
        run(options(), folder, watcher)
    return {**outcome(folder), "steps": watcher.steps}


def same(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    return found == {name: value for name, value in whole.items() if name != "steps"}


@pytest.mark.parametrize("case", METHODS)
def test_every_method_goes_on_from_any_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, chosen, dice = Watcher(), options(case), random.Random(case)
    run(chosen, tmp_path / "whole", watcher)
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: dice.random() < 0.4))
    kills = 0
    while True:
        last = Watcher(dice.randint(2, max(3, watcher.steps // 2)))
        try:
            run(chosen, tmp_path / "parts", last, resume=True)
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_processes_killed_at_random(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tests" / "resume_kills.py"), str(tmp_path), "20"]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["kills"]) >= 20
    for chain in range(1, told["chains"] + 1):
        assert outcome(tmp_path / f"parts-{chain}") == outcome(tmp_path / "whole")


def test_later_seeds_go_on(tmp_path: Path) -> None:
    run(options(seeds=2), tmp_path / "whole", Watcher())
    first = Watcher()
    run(options(), tmp_path / "one", first)
    killed(tmp_path / "parts", first.steps + 8, seeds=2)
    assert (tmp_path / "parts" / "seed.json").exists() and not (tmp_path / "parts" / "checkpoints").exists()
    watcher = Watcher()
    run(options(seeds=2), tmp_path / "parts", watcher, resume=True)
    assert watcher.steps == first.steps - 7
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "parts").rglob("seed.json")) and not list((tmp_path / "parts").rglob("checkpoints"))


def test_times_add_up_and_bars_go_on(tmp_path: Path, whole: dict[str, Any]) -> None:
    killed(tmp_path, 8)
    earlier = read_state(max((tmp_path / "checkpoints").glob("*-float.safetensors")))["usage"]["seconds"]
    watcher = Watcher()
    result = run(options(), tmp_path, watcher, resume=True)
    assert watcher.phases[0] == ("float", 10, 7)
    assert watcher.steps == whole["steps"] - 7
    assert result["runs"][0]["seconds"]["float"] > earlier > 0


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-1000] ^= 1
    return bytes(changed)


def flipped_header(content: bytes) -> bytes:
    at = content.index(b"batches") + 14
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, flipped_header, lambda content: b"", lambda content: b"PK\x03\x04" + content])
def test_damaged_checkpoints_are_passed_over(
    damage: Callable[[bytes], bytes], tmp_path: Path, whole: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path, 17)
    newest = sorted((tmp_path / "checkpoints").glob("*-search.safetensors"))
    assert len(newest) == 3
    for path in newest[1:]:
        path.write_bytes(damage(path.read_bytes()))
    watcher = Watcher()
    run(options(), tmp_path, watcher, resume=True)
    assert watcher.phases[0][2] == 4
    assert caplog.text.count("going on from the one before") == 2 and newest[2].name in caplog.text
    assert same(outcome(tmp_path), whole)


def test_nothing_left_but_options(tmp_path: Path, whole: dict[str, Any]) -> None:
    killed(tmp_path, 17)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"nothing")
    (tmp_path / ".policy.json.x1y2z3").write_text("a write that was cut short")
    assert same(resumed(tmp_path), whole)
    assert not list(tmp_path.glob(".policy*"))


@pytest.mark.parametrize("at", [8, 14], ids=["float", "search"])
def test_full_disk(at: int, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watcher = Watcher(at, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(CheckpointError, match=r"cannot write .*: No space left on device; the last good checkpoint is ") as caught:
        run(options(), tmp_path, watcher, minutes=1e-9)
    last = Path(str(caught.value).rpartition(" ")[2])
    assert read_state(last)["steps"] == at - 1
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.suffix != ".safetensors"]
    monkeypatch.setattr(os, "fsync", real)
    assert same(resumed(tmp_path), whole)


def test_checkpoints_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoints"):
        run(options(), tmp_path, Watcher())


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"is in use by another process \(process 7 on elsewhere\)"):
            run(options(), tmp_path, Watcher())
    killed(tmp_path, 2)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = run(options(), tmp_path, Watcher())
    watcher = Watcher()
    assert run(options(), tmp_path, watcher, resume=True) == json.loads(json.dumps(first))
    assert watcher.steps == 0
    with pytest.raises(CheckpointError, match="already holds a run; go on with it"):
        run(options(), tmp_path, watcher)


def test_other_options_are_refused(tmp_path: Path) -> None:
    killed(tmp_path, 2)
    with pytest.raises(OptionError, match=r"budget: the run in .* began with 'w3a3', got 'w2a2'; leave it out"):
        run(options(budget="w2a2"), tmp_path, Watcher(), resume=True)
    (tmp_path / "options.yaml").write_text("budget: [")
    with pytest.raises(CheckpointError, match=r"options\.yaml is damaged"):
        run(options(), tmp_path, Watcher(), resume=True)


def test_so_many_are_kept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(options(), tmp_path, Watcher(20), minutes=1e-9, keep=2)
    assert [path.stem for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "000000010-float-end", "000000018-search", "000000019-search",
    ]  # fmt: skip
    with pytest.raises(Killed):
        run(options(), tmp_path / "epochs", Watcher(9), minutes=0)
    assert [path.stem for path in (tmp_path / "epochs" / "checkpoints").iterdir()] == ["000000005-float"]
