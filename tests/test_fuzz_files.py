"""Weights, archives, databases and cells from others: reading them ends soon, in a value or in one of qprune's errors."""

from __future__ import annotations

import functools
import gzip
import io
import json
import logging
import random
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzzing import fuzz, refused
from mutations import ODD, changed, damaged
from resume_cases import Small
from safetensors.torch import save as to_bytes
from torch import Tensor

from qprune.compare.stored import read_cell, read_float
from qprune.compare.summary import rows_of, sentence
from qprune.compare.tables import cells_csv, markdown, table_csv
from qprune.study.grid import Point
from qprune.study.options import StudyOptions
from qprune.study.queue import Finished
from qprune.study.run import write_results
from qprune.study.storage import check_sqlite
from qprune.tasks.archive import read_members
from qprune.tasks.weights import load_weights
from tests.cifar_files import archive, member
from tests.study_cases import opened, succeed
from tests.test_compare import CELLS, FLOATS, ORDER


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.CRITICAL)
    yield tmp_path_factory.mktemp("fuzz")
    logging.disable(logging.NOTSET)


@functools.cache
def net() -> tuple[Small, dict[str, Tensor]]:
    made = Small()
    return made, {name: value.clone() for name, value in made.state_dict().items()}


def torch_saved(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def load_into(path: Path) -> None:
    """Into a network that has its old weights if that fails."""
    model, before = net()
    if refused(lambda: load_weights(model, path)):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(before)


@functools.cache
def weights(kind: str) -> bytes:
    state = net()[1]
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"lr": 0.1}}
    return {"zip": torch_saved(state), "legacy": torch_saved(wrapped, False), "safetensors": to_bytes(state)}[kind]


@pytest.mark.parametrize(("kind", "examples"), [("zip", 300), ("legacy", 500), ("safetensors", 300)])
def test_weights_of_damaged_bytes(kind: str, examples: int, place: Path) -> None:
    path = place / f"weights.{kind}"

    @fuzz(examples)
    def check(seed: int) -> None:
        content = damaged(weights(kind), seed)
        if kind == "legacy" and seed % 2:  # in the pickle at its beginning
            chance, data = random.Random(seed), bytearray(weights(kind))
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(3000)] = chance.randrange(256)
            content = bytes(data)
        path.write_bytes(content)
        load_into(path)

    check()


@fuzz(200)
def test_weights_of_other_kinds(place: Path, seed: int) -> None:
    chance, state = random.Random(seed), dict(net()[1])
    name = chance.choice(list(state))
    value = state[name]
    state[name] = chance.choice(
        [
            value.double(), value.int(), value.half(), value.bool(), value.to(torch.complex64), value.unsqueeze(0), value.flatten(),
            value * torch.nan, torch.empty(value.shape, device="meta"), value.to_sparse() if value.dim() else value, 5, "x", None, [value],
        ]
    )  # fmt: skip
    if seed % 5 == 0:
        state["../name"] = value
    (place / "weights.pt").write_bytes(torch_saved(state))
    load_into(place / "weights.pt")


WANTED = {"data/one.bin": 3072, "data/two.bin": 3000}
FILES = {"one.bin": bytes(range(256)) * 12, "two.bin": b"abc" * 1000}
FIELDS = ((0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500))
ODD_FIELDS = (
    b"../../../../etc/passwd",
    b"/etc/x",
    b"7" * 12,
    b"\x80" + b"\xff" * 11,
    bytes(12),
    *(bytes([kind]) for kind in b"SxgLK12356"),
)
ODD_PAX = ("0", "-1", "9" * 30, "../../x", "/etc/x", "x", "1,2,3", "\0", "1e400", "nan", "")


@functools.cache
def packed(place: Path) -> bytes:
    extra = [(member("data", kind=tarfile.DIRTYPE), b""), (member("data/readme", 4), b"text")]
    return archive(place / "whole.tar.gz", FILES, "data", extra).read_bytes()


def forged(tar: bytes, chance: random.Random) -> bytes:
    """With headers that say something else, and whose checksums fit."""
    data = bytearray(tar)
    for _ in range(chance.randint(1, 3)):
        with tarfile.open(fileobj=io.BytesIO(tar)) as file:
            at = chance.choice(file.getmembers()).offset
        start, end = chance.choice(FIELDS)
        value = chance.choice((chance.randbytes(end - start), *ODD_FIELDS))[: end - start]
        data[at + start : at + start + len(value)] = value
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def with_pax(chance: random.Random) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in FILES.items():
            info = member(f"data/{name}", len(content))
            keys = ("size", "path", "linkpath", "mtime", "uid", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size", "hdrcharset")
            info.pax_headers = {chance.choice(keys): chance.choice(ODD_PAX) for _ in range(chance.randint(1, 3))}
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@fuzz(3000)
def test_archives(place: Path, seed: int) -> None:
    """A header that says so of gigabytes must not be believed: tarfile would pass over them for hours."""
    whole, chance, path = packed(place), random.Random(seed), place / "damaged.tar.gz"
    kind = seed % 4
    if kind == 0:
        content = damaged(whole, seed)
    else:
        tar = gzip.decompress(whole)
        content = gzip.compress(damaged(tar, seed) if kind == 1 else forged(tar, chance) if kind == 2 else with_pax(chance), 1)
    path.write_bytes(content)

    def read() -> None:
        found = read_members(path, WANTED)
        assert set(found) == set(WANTED) and all(len(content) <= WANTED[name] for name, content in found.items())

    refused(read)


@functools.cache
def database(place: Path) -> bytes:
    path = place / "whole.db"
    queue = opened(f"sqlite:///{path}")
    queue.fill()
    for _ in range(4):
        queue.work(succeed)
    queue.close()
    return path.read_bytes()


def work_with(path: Path) -> None:
    check_sqlite(path)
    queue = opened(f"sqlite:///{path}")
    try:
        queue.progress(), queue.errors(), queue.finished()
        queue.fill(retry_failed=True)
        queue.repair()
        queue.work(succeed)
        queue.progress()
    finally:
        queue.close()


def fresh(place: Path, content: bytes) -> Path:
    path = place / "study.db"
    for old in place.glob("study.db*"):
        old.unlink()
    path.write_bytes(content)
    return path


@fuzz(500)
def test_databases_are_looked_at_first(place: Path, seed: int) -> None:
    content = damaged(database(place), seed)
    path = fresh(place, content)
    refused(lambda: check_sqlite(path))
    assert path.read_bytes() == content


@fuzz(50)
def test_databases_of_damaged_bytes(place: Path, seed: int) -> None:
    path = fresh(place, damaged(database(place), seed))
    refused(lambda: work_with(path))


PLAIN = (
    *(value for value in ODD if isinstance(value, int | float | str) and value != "\ud800"),
    None,
    "{",
    '{"a": 1}',
    "COMPLETE",
    "FAIL",
    b"\xff",
)


@fuzz(40)
def test_databases_with_other_rows(place: Path, seed: int) -> None:
    path, chance = fresh(place, database(place)), random.Random(seed)
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for _ in range(chance.randint(1, 3)):
        table = chance.choice(tables)
        column = chance.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
        row = f"rowid IN (SELECT rowid FROM {table} LIMIT 1 OFFSET {chance.randrange(5)})"
        try:
            if chance.random() < 0.3:
                connection.execute(f"DELETE FROM {table} WHERE {row}")
            else:
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {row}", (chance.choice(PLAIN),))
        except (sqlite3.Error, OverflowError):  # a value that the column cannot have
            pass
    connection.commit()
    connection.close()
    refused(lambda: work_with(path))


@pytest.mark.filterwarnings("ignore:Precision loss occurred", "ignore:invalid value encountered", "ignore:overflow encountered")
@fuzz(600)
def test_cells_of_comparisons(place: Path, seed: int) -> None:
    chosen = CELLS[seed % len(CELLS)]
    text = json.dumps(changed(chosen, seed))
    (place / "result.json").write_bytes(damaged(text.encode(), seed) if seed % 4 == 0 else text.encode())
    (place / "float-0.json").write_text(json.dumps(changed(FLOATS[0], seed + 1) if seed % 3 == 0 else FLOATS[0]))

    def read_all() -> None:
        cell, network = read_cell(place), read_float(place, 0)
        assert cell is not None and network is not None
        cells = [*(other for other in CELLS if other is not chosen), cell]
        rows = rows_of(cells, [network, *FLOATS[1:]], ORDER, {"w3a3": {"bops": 10e6}})
        json.dumps({"rows": rows, "sentence": sentence(rows, "w3a3")}, allow_nan=False)
        markdown(rows), table_csv(rows), cells_csv(cells)

    refused(read_all)


@pytest.mark.filterwarnings("ignore:Precision loss occurred", "ignore:invalid value encountered", "ignore:overflow encountered")
def test_trials_of_studies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprune.study.run.study_page", lambda result: "")
    points = [Point(f"p{index}", (float(index),), index % 2 == 0, 1e6 + index) for index in range(4)]
    bench: Any = SimpleNamespace(points=points, kind=SimpleNamespace(measure="BOPs"))
    progress = SimpleNamespace(done=1, total=8)
    result = {
        "label": "p", "cost": 1e6, "val_accuracy": 0.9, "test_accuracy": 0.9, "test_loss": 0.3, "val_loss": 0.3, "train_loss": 0.2,
        "float_network": "00", "host": "h", "pid": 1, "seconds": {"float": 1.0},
    }  # fmt: skip

    @fuzz(300)
    def check(seed: int) -> None:
        grid = [(index, number) for index in range(4) for number in (0, 1)]
        trials = [Finished(point, changed(result, seed) if i == seed % 8 else result, 1.0) for i, point in enumerate(grid)]
        queue: Any = SimpleNamespace(finished=lambda: trials, progress=lambda: progress, errors=dict)
        refused(lambda: write_results(StudyOptions(), place / "study", bench, queue))

    check()
