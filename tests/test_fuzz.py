"""Readers of files that others may have made: whatever is in them, the outcome is a value or one of qprune's errors, soon."""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import fuzz, refused
from mutations import ODD, changed, changed_text, damaged
from resume_cases import Small
from safetensors.torch import save as to_bytes
from torch import nn

import qprune
from qprune import Policy, SearchSpace, convert, cost, load, load_packed, prepare, save, save_packed
from qprune.checkpoint import read
from qprune.config import read_file, read_words
from qprune.cost import geometry_of
from qprune.errors import QPruneError
from qprune.export import packed
from qprune.geometry import Geometry
from qprune.options import RunOptions
from qprune.plainyaml import MOST_BYTES
from qprune.result import layers_of, read_result, runs_of, summary
from qprune.resume import statefile
from qprune.resume.folder import OPTIONS, stored_options


@functools.cache
def final() -> nn.Module:
    torch.manual_seed(0)
    mixed = prepare(Small(), SearchSpace((0, 2, 4, 32), (4,), granularity="filter"), {"fc": None}, example_inputs=torch.zeros(1, 1, 8, 8))
    mixed.train()(torch.randn(4, 1, 8, 8))
    bits = (2, 4, 32, 0, 2, 4, 2, 0)
    return convert(mixed, Policy({name: (bits, 4) for name in geometry_of(mixed).layers if name != "fc"}, geometry_of(mixed))).eval()


@functools.cache
def policy_text() -> str:
    return qprune.checkpoint.policy_of(final()).to_json()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def use(policy: Policy) -> None:
    """What is done with a policy from a file: it is costed, written, and given to a network."""
    Policy.from_json(policy.to_json())
    if policy.geometry is not None:
        cost(policy)
    convert(Small(), policy)


@fuzz(1000)
def test_policy_bytes(place: Path, seed: int) -> None:
    path = place / "policy.json"
    path.write_bytes(damaged(policy_text().encode(), seed))
    refused(lambda: Policy.load(path))


@fuzz(600)
def test_policy_values(seed: int) -> None:
    refused(lambda: use(Policy.from_json(changed_text(policy_text(), seed))))


@fuzz(600)
def test_geometry_whose_fingerprint_fits(seed: int) -> None:
    """As somebody would write it who knows how."""
    data = json.loads(policy_text())
    data["geometry"] = changed(data["geometry"], seed)
    with contextlib.suppress(QPruneError, TypeError, ValueError, KeyError, AttributeError):
        data["fingerprint"] = Geometry.from_json(data["geometry"]).fingerprint
    refused(lambda: use(Policy.from_json(json.dumps(data))))


CONFIG = RunOptions(method="zur", pairs=((2, 2), (4, 8)), method_options={"samples": 4}, data_options={"size": 32}).as_dict()


@fuzz(500)
def test_configuration(place: Path, seed: int) -> None:
    values = changed(CONFIG, seed)
    text = json.dumps(values) if seed % 2 else yaml.safe_dump(CONFIG)
    for name in ("run.yaml", OPTIONS):
        (place / name).write_bytes(text.encode() if seed % 2 else damaged(text.encode(), seed))
    refused(lambda: RunOptions(**read_file(place / "run.yaml")).as_dict())
    refused(lambda: stored_options(place))


@fuzz(400)
def test_words(seed: int) -> None:
    word = f"{list(CONFIG)[seed % len(CONFIG)]}={damaged(b'[2, 4]', seed).decode('latin1')}"
    refused(lambda: RunOptions(**read_words([word])))
    refused(lambda: RunOptions(**read_words([damaged(word.encode(), seed).decode("latin1")])))


def test_bombs(place: Path) -> None:
    path = place / "bomb.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    for text in ("\n".join(lines), "seeds: " + "[" * 20_000, "x" * (MOST_BYTES + 1), "seeds: " + "1" * 900_000, "? " * 100_000):
        path.write_text(text)
        assert refused(lambda: read_file(path)), text[:50]
    assert refused(lambda: read_file(Path("/dev/zero")))


@functools.cache
def saved(write: Callable[[nn.Module, Path], Any], place: Path) -> tuple[bytes, dict[str, str], dict[str, torch.Tensor]]:
    path = place / write.__name__
    write(final(), path)
    return path.read_bytes(), *read(path)


def rewritten(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """One tensor of another shape, type or name, or gone."""
    name = sorted(tensors)[seed % len(tensors)]
    value = tensors[name]
    other: dict[int, Callable[[], torch.Tensor]] = {
        0: lambda: value.flatten()[:-1], 1: lambda: value.to(torch.int64), 2: lambda: value.unsqueeze(0), 3: lambda: value.double(),
        4: lambda: torch.full_like(value, 255), 5: lambda: torch.cat([value.flatten()] * 2), 6: lambda: torch.zeros(0),
        7: lambda: value.to(torch.bool),
    }  # fmt: skip
    kept = {key: item for key, item in tensors.items() if key != name}
    kind = seed // 1000 % 10
    if kind in other:
        return {**kept, name: other[kind]().contiguous()}
    return kept if kind == 8 else {**kept, f"../{name}": value}


@pytest.mark.parametrize("write", [save, save_packed], ids=["saved", "packed"])
def test_networks_of_damaged_bytes(write: Callable[..., Any], place: Path) -> None:
    content, *_ = saved(write, place)
    read_back = load if write is save else load_packed
    path = place / "bytes"

    @fuzz(400)
    def check(seed: int) -> None:
        path.write_bytes(damaged(content, seed))
        refused(lambda: read_back(path, Small))

    check()


@fuzz(250)
def test_saved_networks(place: Path, seed: int) -> None:
    _, header, tensors = saved(save, place)
    path = place / "saved"
    if seed % 4:
        name = sorted(set(header) - {"format"})[seed // 4 % (len(header) - 1)]
        text = (
            changed_text(header[name], seed)
            if header[name][:1] == "{" and seed % 5
            else damaged(header[name].encode(), seed).decode("latin1")
        )
        path.write_bytes(to_bytes(tensors, {**header, name: text}))
    else:
        path.write_bytes(to_bytes(rewritten(tensors, seed), header))
    refused(lambda: load(path, Small))


@fuzz(250)
def test_packed_networks(place: Path, seed: int) -> None:
    _, header, tensors = saved(save_packed, place)
    tensors = dict(tensors)
    tensors.pop("packed.sha256")
    if seed % 4:
        structure = json.loads(zlib.decompress(tensors["packed.header"].numpy().tobytes()))
        name = sorted(structure)[seed // 4 % len(structure)]
        inner = changed_text(structure[name], seed) if seed % 5 else changed(ODD, seed)[0]
        tensors["packed.header"] = packed._bytes(zlib.compress(json.dumps({**structure, name: inner}).encode()))
    else:
        tensors = rewritten(tensors, seed)
    tensors["packed.sha256"] = packed._digest(tensors)
    path = place / "packed"
    path.write_bytes(to_bytes(tensors, header))
    refused(lambda: load_packed(path, Small))


STATE = {"steps": 3, "metrics": 7, "loop": {"a": torch.arange(6.0).view(2, 3).t(), 4: (1, [2.5, None], "x")}, "rng": torch.ones(5)}


def write_state(_: nn.Module, path: Path) -> None:
    statefile.write_state(path, STATE)


@fuzz(800)
def test_states_of_runs(place: Path, seed: int) -> None:
    content, header, tensors = saved(write_state, place)
    path = place / "state"
    if seed % 4 == 0:
        path.write_bytes(damaged(content, seed))
    else:
        text = changed_text(header["state"], seed) if seed % 4 < 3 else damaged(header["state"].encode(), seed).decode("latin1")
        path.write_bytes(to_bytes(tensors, {**header, "state": text, "digest": statefile._digest(text, tensors)}))
    refused(lambda: statefile.read_state(path))


def entry(seed: int) -> dict[str, Any]:
    network = {
        "label": "w3a3",
        "accuracy": 0.9,
        "val_accuracy": 0.9,
        "bops": 1e9,
        "macs": 1e8,
        "size_bits": 1e5,
        "w_bits": 3.0,
        "a_bits": 3.0,
    }
    return {
        "seed": seed,
        "networks": dict.fromkeys(("float", "searched", "uniform"), network),
        "seconds": {"float": 1.0, "search": 2.0, "float_epoch": 0.5},
        "policy": {"conv1": {"w_bits": [2, 4, 0], "a_bits": 4}},
        "input_bits": {"conv1": 4.0},
        "search_history": [{"epoch": 1, "loss": 1.0, "cost": 0.9}],
    }


RESULT = {
    "format": 1,
    "options": CONFIG,
    "budget": {"text": "w3a3", "limits": {"bops": 1e9}},
    "layers": [{"name": "conv1", "kind": "Conv2d", "filters": 3, "macs": 100, "weights": 27}],
    "runs": [entry(0), entry(1)],
    "summary": {"float": {"label": "float", "accuracy_mean": 0.9, "accuracy_ci95": None, "bops": 1e9, "size_bits": 1e5}, "verdict": "none"},
}


@fuzz(1000)
def test_results(place: Path, seed: int) -> None:
    folder = place / "run"
    folder.mkdir(exist_ok=True)
    text = json.dumps(changed(RESULT, seed) if seed % 3 else RESULT)
    metrics = "\n".join(json.dumps(changed({"phase": "search", "seed": 0, "epoch": 1, "loss": 0.5}, seed + i)) for i in range(3))
    (folder / "metrics.jsonl").write_bytes(metrics.encode() if seed % 3 else damaged(metrics.encode(), seed))
    (folder / "result.json").write_bytes(text.encode() if seed % 3 else damaged(text.encode(), seed))
    if seed % 5 == 0:
        (folder / "result.json").unlink()

    def read_all() -> None:
        result = read_result(folder)
        runs_of(result)
        layers_of(result)
        summary(result, "float", "bops")

    refused(read_all)
