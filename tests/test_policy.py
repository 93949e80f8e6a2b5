"""Policies: their checks, their file, and what a damaged or foreign one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qprune import CheckpointError, Policy, PolicyMismatchError, SearchSpace, cost, prepare
from qprune.cost import geometry_of
from qprune.geometry import Geometry, LayerGeometry, Unit, trace_geometry
from qprune.policy import FORMAT, LayerBits
from qprune.tasks import models


def geometry(filters: int = 4) -> Geometry:
    net = nn.Sequential(nn.Conv2d(3, filters, 3), nn.ReLU(), nn.Conv2d(filters, 2, 1))
    return geometry_of(prepare(net, SearchSpace(), example_inputs=torch.zeros(1, 3, 8, 8)))


def policy() -> Policy:
    return Policy({"0": ((0, 2, 4, 8), 4), "2": (3, 8)}, geometry())


def test_forms_of_a_layer() -> None:
    forms: list[Any] = [LayerBits(4, 8), (4, 8), [4, 8], {"w_bits": 4, "a_bits": 8}]
    assert {Policy({"0": form}).layers["0"] for form in forms} == {LayerBits(4, 8)}
    forms = [LayerBits((0, 2), 8), ((0, 2), 8), ([0, 2], 8), {"w_bits": [0, 2], "a_bits": 8}]
    assert {Policy({"0": form}).layers["0"] for form in forms} == {LayerBits((0, 2), 8)}


@pytest.mark.parametrize(
    "bits",
    [(9, 4), (4, 9), (-1, 4), (16, 4), ((2, 9), 4), (4, (4,)), (4, [2, 4]), ((), 4), (4.0, 4), ("4", 4), ("48", 4), (True, 4), (4, True),
     (4, None), (None, 4), (4,), (4, 4, 4), 4, None, "w4a4", {"w_bits": 4}, {"w": 4, "a": 4}],
    ids=repr,
)  # fmt: skip
def test_bits_that_do_not_exist(bits: Any) -> None:
    with pytest.raises(PolicyMismatchError, match="layer conv1: "):
        Policy({"conv1": bits})


@pytest.mark.parametrize("bits", [LayerBits(9, 4), LayerBits(4, 9), LayerBits((2, 9), 4), LayerBits(4, (2, 4))], ids=repr)  # type: ignore[arg-type]
def test_layer_bits_are_checked_too(bits: LayerBits) -> None:
    with pytest.raises(PolicyMismatchError, match=r"layer conv1: ._bits: .* got "):
        Policy({"conv1": bits})


def test_checks_against_the_network() -> None:
    with pytest.raises(PolicyMismatchError, match="names layer '3', which this network does not have"):
        Policy({"3": (4, 4)}, geometry())
    with pytest.raises(PolicyMismatchError, match="layer 0: the policy has w_bits for 3 filters, the layer has 4"):
        Policy({"0": ((2, 4, 8), 4)}, geometry())
    other = geometry(filters=5)
    with pytest.raises(PolicyMismatchError, match=f"fingerprint {geometry().fingerprint}, this one has {other.fingerprint}"):
        policy().check(other)
    policy().check(geometry())
    Policy({"0": (4, 4)}).check(other)


def test_uniform() -> None:
    found = Policy.uniform(geometry(), 3, 5)
    assert dict(found.layers) == {"0": LayerBits(3, 5), "2": LayerBits(3, 5)}
    assert found.geometry == geometry()
    fixed = Policy.uniform(geometry(), 3, 5, {"0": LayerBits(8, 8), "2": None})
    assert dict(fixed.layers) == {"0": LayerBits(8, 8)}
    assert fixed.bits("2") == LayerBits(32, 32)
    with pytest.raises(PolicyMismatchError, match="got 9"):
        Policy.uniform(geometry(), 9, 4)


def test_pruned() -> None:
    assert Policy({"a": ((0, 2, 0), 4), "b": (0, 4), "c": (2, 4), "d": ((2, 4), 0)}).pruned() == {"a": [0, 2], "b": [0]}


@pytest.mark.parametrize("where", [geometry(), None], ids=["with geometry", "without"])
def test_round_trip(where: Geometry | None, tmp_path: Path) -> None:
    first = Policy(policy().layers, where)
    again = Policy.from_json(first.to_json())
    assert again == first
    assert again.geometry == where
    first.save(tmp_path / "deep" / "policy.json")
    assert Policy.load(str(tmp_path / "deep" / "policy.json")) == first
    if where is not None:
        assert float(cost(again).bops) == float(cost(first).bops)


def test_round_trip_keeps_channel_groups(tmp_path: Path) -> None:
    mixed = prepare(models.mobilenet(in_channels=3), SearchSpace(), example_inputs=torch.zeros(1, 3, 16, 16))
    first = Policy.uniform(geometry_of(mixed), 4, 4)
    first.save(tmp_path / "policy.json")
    again = Policy.load(tmp_path / "policy.json")
    assert again.geometry == geometry_of(mixed)
    assert again.geometry is not None
    assert again.geometry.groups


def test_the_file_is_small_readable_json() -> None:
    data = json.loads(policy().to_json())
    assert data["format"] == FORMAT == 1
    assert data["fingerprint"] == geometry().fingerprint
    assert data["layers"] == {"0": {"w_bits": [0, 2, 4, 8], "a_bits": 4}, "2": {"w_bits": 3, "a_bits": 8}}


def edited(change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(policy().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "not a policy file"),
        ("{", "not a policy file"),
        ("[1, 2]", "not a policy file"),
        ("3", "not a policy file"),
        ("null", "not a policy file"),
        ('{"layers": {}}', "not a policy file"),
        (policy().to_json()[:-40], "not a policy file"),
        (edited(lambda d: d.update(format=2)), "has format 2; this version of qprune reads format 1"),
        (edited(lambda d: d.update(format=0)), "has format 0"),
        (edited(lambda d: d.pop("layers")), "damaged: KeyError: 'layers'"),
        (edited(lambda d: d.update(layers=[1])), "damaged"),
        (edited(lambda d: d.update(layers=None)), "damaged"),
        (edited(lambda d: d.update(geometry="none")), "damaged"),
        (edited(lambda d: d["geometry"].pop("groups")), "damaged: KeyError: 'groups'"),
        (edited(lambda d: d["geometry"]["layers"][0].pop("kind")), "damaged"),
        (edited(lambda d: d["geometry"]["layers"][0].update(filters=8)), "damaged: its geometry has fingerprint"),
        (edited(lambda d: d.update(fingerprint="0" * 16)), "damaged: its geometry has fingerprint"),
    ],
)
def test_damaged_text(text: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        Policy.from_json(text)
    assert "\n" not in str(caught.value)


def test_impossible_bits_in_a_file() -> None:
    with pytest.raises(PolicyMismatchError, match=r"layer 2: a_bits: .* got 9"):
        Policy.from_json(edited(lambda d: d["layers"]["2"].update(a_bits=9)))
    with pytest.raises(PolicyMismatchError, match="w_bits for 3 filters, the layer has 4"):
        Policy.from_json(edited(lambda d: d["layers"]["0"]["w_bits"].pop()))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read the policy .*nothing\.json: .*No such file"):
        Policy.load(tmp_path / "nothing.json")
    with pytest.raises(CheckpointError, match="cannot read the policy"):
        Policy.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80\x04\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read the policy"):
        Policy.load(tmp_path / "binary")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write .*policy\.json: "):
        policy().save(tmp_path / "file" / "policy.json")
    assert (tmp_path / "file").read_text() == "x"


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    policy().save(path)
    before = path.read_bytes()

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        Policy({"0": (2, 2)}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint_ignores_weights_and_knows_shapes() -> None:
    def fingerprint(net: nn.Module, side: int = 16) -> str:
        return Geometry(trace_geometry(net, torch.zeros(2, 3, side, side))).fingerprint

    assert fingerprint(models.resnet8(in_channels=3)) == fingerprint(models.resnet8(in_channels=3))
    assert fingerprint(models.resnet8(in_channels=3)) != fingerprint(models.resnet8(in_channels=3), side=32)


def test_uniform_with_producers_reads_the_image_at_8_bits() -> None:
    layers = {
        name: LayerGeometry(name, kind, 4, 3, 9, 1, 1) for name, kind in (("first", "Conv2d"), ("second", "Conv2d"), ("fc", "Linear"))
    }
    units = {"first": Unit("bn1", "relu1", None), "second": Unit("bn2", "relu2", "first"), "fc": Unit(None, None, None)}
    policy = Policy.uniform(Geometry(layers, units=units), 3, 4)
    assert {name: (bits.w_bits, bits.a_bits) for name, bits in policy.layers.items()} == {"first": (3, 8), "second": (3, 4), "fc": (3, 4)}
