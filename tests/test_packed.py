"""Packed files: the network that comes back computes the same, bit for bit, and the file is as large as its parts say."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookalikes import build as lookalike
from lookalikes.policies import X as IMAGES
from lookalikes.policies import outputs, prepared, random_policy
from safetensors.torch import save_file
from torch import nn

import qprune
from qprune import CheckpointError, Policy, SearchSpace, convert, cost, load_packed, prepare, save, save_packed
from qprune.checkpoint import policy_of
from qprune.codebooks import codebooks
from qprune.codes import weight_codes
from qprune.cost import geometry_of
from qprune.errors import InputError
from qprune.export import packed
from qprune.export.packed import PackedSizes
from qprune.nn import QuantConv2d, QuantLinear, integer
from qprune.nn.codebook import to_codebook
from qprune.nn.quantizing import Quantizing
from qprune.nn.surgery import replace_modules
from qprune.policy import LayerBits
from qprune.stored import stored_sizes
from qprune.tasks import models

NETWORKS = {
    "resnet8": lambda: models.resnet8(in_channels=1),
    "thin_resnet": lambda: models.thin_resnet(in_channels=1),
    "resnet20": lambda: models.resnet20(in_channels=1).to(memory_format=torch.channels_last),
    "mobilenet": lambda: models.mobilenet(in_channels=1),
    "lenet5": lambda: models.lenet5(in_channels=1, image_size=16),
}
X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def final_model(build: Callable[[], nn.Module], w_bits: tuple[int, ...], a_bits: tuple[int, ...], **space: Any) -> nn.Module:
    """A network whose filters take turns in w_bits and layers in a_bits, its last layer float."""
    torch.manual_seed(0)
    mixed = prepare(build(), SearchSpace(w_bits, a_bits, granularity="filter", **space), example_inputs=X)
    mixed.train()(torch.randn(8, 1, 16, 16))
    geometry = geometry_of(mixed)
    layers = {
        name: (tuple(w_bits[(f + i) % len(w_bits)] for f in range(layer.filters)), a_bits[i % len(a_bits)])
        for i, (name, layer) in enumerate(geometry.layers.items())
    }
    layers.pop(list(layers)[-1])
    return convert(mixed, Policy(layers, geometry)).eval()


def round_trip(final: nn.Module, build: Callable[[], nn.Module], path: Path, **options: Any) -> tuple[nn.Module, PackedSizes]:
    """Pack and read: same outputs, policy and bytes, and sizes that add up."""
    parts = save_packed(final, path, **options)
    again = load_packed(path, build)
    assert parts.total == path.stat().st_size
    with torch.no_grad():
        assert torch.equal(again(X), final.eval()(X))
    assert policy_of(again) == policy_of(final)
    second = path.with_name("second")
    save_packed(again, second, **options)
    assert second.read_bytes() == path.read_bytes()
    return again, parts


SPACES: dict[str, dict[str, Any]] = {
    "lsq": {},
    "symmetric-layer": {"weight_quantizer": "symmetric", "scales": "layer"},
    "dorefa-lsq+": {"weight_quantizer": "dorefa", "input_quantizer": "lsq+"},
    "dorefa-layer": {"weight_quantizer": "dorefa", "scales": "layer"},
}


@pytest.mark.parametrize("space", SPACES)
def test_every_width_comes_back(space: str, tmp_path: Path) -> None:
    build = NETWORKS["resnet8"]
    final = final_model(build, (1, 2, 3, 4, 5, 6, 7, 8, 32), (2, 5, 8, 32), **SPACES[space])
    again, parts = round_trip(final, build, tmp_path / "net.packed")
    here, there = (dict(m.named_modules()) for m in (final, again))
    for name, layer in here.items():
        if isinstance(layer, Quantizing):
            before, after = weight_codes(layer), weight_codes(there[name])
            assert torch.equal(before.levels, after.levels) and torch.equal(before.scale, after.scale) and before.bits == after.bits
    assert parts.codes == -(-int(cost(final).size_bits) // 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_is_what_the_cost_says(name: str, tmp_path: Path) -> None:
    build = NETWORKS[name]
    final = final_model(build, (2, 3, 4, 8), (4, 8))
    _, parts = round_trip(final, build, tmp_path / "net.packed")
    expected = cost(final)
    widths = sum(4 * len(layer.w_bits) for layer in final.modules() if isinstance(layer, Quantizing) and len(set(layer.w_bits)) > 1)
    assert parts.codes == -(-int(expected.size_bits) // 8)
    assert 8 * parts.scales + widths == expected.overhead_bits
    assert parts.index == parts.codebooks == 0
    rest = [v for n, v in final.state_dict().items() if not n.endswith(("weight", "log_range"))]
    rest += [v for n, v in final.state_dict().items() if n.endswith("weight") and v.dim() == 1]
    assert parts.tensors == sum(v.nbytes for v in rest)


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("space", [{}, {"weight_quantizer": "dorefa", "input_quantizer": "lsq+"}], ids=["lsq", "dorefa"])
@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "lenet5"])
def test_pruned_networks(name: str, space: dict[str, Any], remove: bool, tmp_path: Path) -> None:
    build = NETWORKS[name]
    mixed = prepare(build(), SearchSpace((0, 2, 4), (4, 8), granularity="filter", **space), example_inputs=X)
    mixed.train()(torch.randn(8, 1, 16, 16))
    geometry = geometry_of(mixed)
    names = list(geometry.layers)
    layers = {
        n: (tuple((4, 0, 2, 2)[f % 4] for f in range(layer.filters)) if n != names[-1] else 4, 8) for n, layer in geometry.layers.items()
    }
    policy = Policy(layers, geometry)
    final = convert(mixed, policy, remove=remove).eval()
    _, parts = round_trip(final, build, tmp_path / "net.packed")
    expected = -(-int(cost(policy).size_bits) // 8)
    # where pruned channels stay, a grid with a zero also codes the weights that read them
    assert parts.codes > expected if not (remove or space) else parts.codes == expected


@pytest.mark.parametrize("name", ["resnext", "densenet", "mobilenet_v3", "unet", "shared"])
def test_networks_of_other_wirings(name: str, tmp_path: Path) -> None:
    mixed = prepared(name).float().eval()
    policy = random_policy(mixed, 3)
    final = convert(mixed, policy).eval()
    parts = save_packed(final, tmp_path / "net.packed")
    again = load_packed(tmp_path / "net.packed", lambda: lookalike(name))
    assert parts.total == (tmp_path / "net.packed").stat().st_size
    assert all(torch.equal(y, other) for y, other in zip(outputs(again, IMAGES), outputs(final, IMAGES), strict=True))
    found = qprune.verify(again, [IMAGES], strict=True)
    assert any(row.status == "integer" and row.error > 0 for row in found.layers)


@pytest.mark.parametrize("negative", [True, False])
def test_folded_networks(negative: bool, tmp_path: Path) -> None:
    build = NETWORKS["resnet8"]
    final = final_model(build, (1, 2, 3, 8, 32), (4, 8), weight_quantizer="symmetric")
    with torch.no_grad():
        final.bn1.weight[::3] *= -1
    folded = qprune.fold(final, X, negative_scales=negative)
    again, parts = round_trip(folded, build, tmp_path / "net.packed")
    assert sum(isinstance(module, nn.BatchNorm2d) for module in again.modules()) == 0
    assert parts.codes == -(-int(cost(final).size_bits) // 8)
    assert qprune.verify(again, [X]).ok


UNITS: dict[str, dict[str, Any]] = {
    "nice": {},
    "own": {"shared_weights": False},
    "uniq": {"weight_quantizer": "uniq", "input_quantizer": "uniq"},
    "lsq-pact": {"weight_quantizer": "lsq", "input_quantizer": "pact"},
}


@pytest.mark.parametrize("case", UNITS)
def test_activations_quantized_where_they_are_produced(case: str, tmp_path: Path) -> None:
    options = {"placement": "output", "weight_quantizer": "nice", "input_quantizer": "nice", **UNITS[case]}
    build = NETWORKS["resnet8"]
    torch.manual_seed(0)
    space = SearchSpace(pairs=((2, 2), (2, 4), (3, 3), (8, 8)), granularity="filter", **options)
    mixed = prepare(build(), space, example_inputs=X)
    geometry = geometry_of(mixed)
    layers = {}
    for name, layer in geometry.layers.items():
        pairs = [space.candidates[f % 4] for f in range(layer.filters)]
        produces = name in geometry.units and geometry.units[name].activation is not None
        reads = 8 if geometry.units[name].source is None else 32
        layers[name] = LayerBits(tuple(w for w, _ in pairs), reads, tuple(a for _, a in pairs) if produces else None)
    final = convert(build(), Policy(layers, geometry), space)
    qprune.calibrate(final, [X])
    again, parts = round_trip(final, build, tmp_path / "net.packed")
    assert parts.codes == -(-int(cost(final).size_bits) // 8)
    assert (parts.codebooks > 0) == (case == "uniq")
    assert any(type(module).__name__ == "QuantActivation" for module in again.modules())


def coded(linear: bool, structured: bool = False) -> tuple[nn.Module, Callable[[], nn.Module]]:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 12, 10))

    net, random = build(), torch.Generator().manual_seed(1)
    swaps = {}
    for i, share, bits in ((0, 0.6, 3), (2, 0.05, 5), (5, 0.01, 2)):
        layer = net[i]
        mask = torch.rand(layer.weight.shape, generator=random) < share
        if structured:
            mask = (torch.rand(len(mask), generator=random) < 0.6).view(-1, *[1] * (mask.dim() - 1)).expand_as(mask)
        size = 2**bits
        values = torch.randn(size, generator=random).sort().values
        values = codebooks({"0": layer.weight}, [bits], linear=True)["0"][bits].values if linear else values
        swaps[layer] = to_codebook(layer, mask, values, 4 if i else 32, linear)
    net = replace_modules(net, swaps)
    net.train()(X)
    return net.eval(), build


@pytest.mark.parametrize("structured", [False, True], ids=["weights", "filters"])
@pytest.mark.parametrize("linear", [False, True], ids=["shared", "linear"])
def test_codebooks_and_masks(linear: bool, structured: bool, tmp_path: Path) -> None:
    net, build = coded(linear, structured)
    _, parts = round_trip(net, build, tmp_path / "net.packed")
    expected = stored_sizes(net).total
    assert parts.codes == -(-expected.values // 8)
    assert parts.index == -(-expected.index // 8) and parts.codebooks == -(-expected.books // 8)
    _, plain = round_trip(net, build, tmp_path / "plain.packed", index="plain")
    entries = sum(len(layer.mask) if structured else layer.mask.numel() for layer in net.modules() if hasattr(layer, "mask"))
    assert plain.index == -(-entries // 8) > parts.index or structured
    assert plain.codes == parts.codes


def test_a_codebook_that_two_numbers_do_not_give_is_stored_whole(tmp_path: Path) -> None:
    net, build = coded(True)
    net[2].codebook[7] *= 1.0000002
    _, parts = round_trip(net, build, tmp_path / "net.packed")
    assert parts.codebooks == 4 * (2 + 32 + 2)


def test_a_codebook_network_trains_on(tmp_path: Path) -> None:
    net, build = coded(False)
    again, _ = round_trip(net, build, tmp_path / "net.packed")
    again.train()(X).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_a_shared_layer_and_a_float_network(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Conv2d(1, 1, 3, padding=1)
        return nn.Sequential(shared, nn.BatchNorm2d(1), nn.ReLU(), shared, nn.Flatten(), nn.Linear(256, 4))

    net = convert(build(), Policy({"0": (3, 8), "5": ((2, 4, 8, 32), 5)}))
    net.train()(X)
    again, parts = round_trip(net, build, tmp_path / "net.packed")
    assert again[0] is again[3]
    assert parts.codes == -(-(9 * 3 + 256 * (2 + 4 + 8 + 32)) // 8)
    _, parts = round_trip(build().eval(), build, tmp_path / "float.packed")
    assert parts.codes == 4 * (9 + 4 * 256) and parts.scales == 0


def test_layers_of_other_precision_come_back_as_they_are(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(392, 4))

    net = convert(build(), Policy({"0": (3, 8)})).eval()
    net[3].bfloat16()
    save_packed(net, tmp_path / "net.packed")
    again = load_packed(tmp_path / "net.packed", build)
    assert again[3].weight.dtype == again[3].bias.dtype == torch.bfloat16 and again[1].weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again[3](again[:3](X).bfloat16()), net[3](net[:3](X).bfloat16()))


def test_a_loaded_network_is_for_inference(tmp_path: Path) -> None:
    build = NETWORKS["lenet5"]
    again, _ = round_trip(final_model(build, (1, 4), (4,)), build, tmp_path / "net.packed")
    layers = [layer for layer in again.modules() if isinstance(layer, QuantConv2d | QuantLinear)]
    assert layers and not any(layer.weight.requires_grad for layer in layers)
    copied = copy.deepcopy(again)
    with torch.no_grad():
        assert torch.equal(copied(X), again(X))
    for layer, other in zip(layers, [m for m in copied.train().modules() if isinstance(m, QuantConv2d | QuantLinear)], strict=True):
        assert torch.equal(other.weight_quantizer(other.weight, other.one_hot), layer.weight)
    state = again.state_dict()
    blank = load_packed(tmp_path / "net.packed", build)
    for layer in blank.modules():
        if isinstance(layer, QuantConv2d):
            layer.weight.zero_()
            layer.weight_quantizer.scale.zero_()
    blank.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in blank.state_dict().items())
    with pytest.raises(CheckpointError, match="read from packed codes"):
        save(again, tmp_path / "net.safetensors")


def test_loaded_layers_evaluate_on_integers(tmp_path: Path) -> None:
    build = NETWORKS["resnet20"]
    final = final_model(build, (2, 4, 8), (4, 8))
    again, _ = round_trip(final, build, tmp_path / "net.packed")
    layers = {name: layer for name, layer in again.named_modules() if isinstance(layer, QuantConv2d) and layer.in_channels % 16 == 0}
    assert len(layers) == 20
    for name, layer in layers.items():
        x = torch.randn(2, layer.in_channels, 6, 6)
        with torch.no_grad(), integer.enabled():
            y = layer(x)
            codes = integer._kept[layer]
            assert torch.equal(layer(x), y) and integer._kept[layer] is codes
        with torch.no_grad():
            torch.testing.assert_close(y, dict(final.named_modules())[name](x), rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    build, path = NETWORKS["lenet5"], tmp_path / "net.packed"
    final = final_model(build, (2, 4), (4,))
    with pytest.raises(InputError, match="index is one of plain, entropy, got 'zip'"):
        save_packed(final, path, index="zip")
    with pytest.raises(CheckpointError, match="still has candidates"):
        save_packed(prepare(build(), SearchSpace()), path)
    with pytest.raises(CheckpointError, match=r"weight of layer .* is torch.float64, expected float32: call model.float\(\)"):
        save_packed(copy.deepcopy(final).double(), path)
    assert not path.exists()
    save_packed(final, path)
    with pytest.raises(CheckpointError, match="does not fit this network"):
        load_packed(path, lambda: models.lenet5(in_channels=1, image_size=20))
    with pytest.raises(CheckpointError, match="does not fit this network"):
        load_packed(path, NETWORKS["resnet8"])
    save(final, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"is not a packed network; read it with qprune.load"):
        load_packed(tmp_path / "saved", build)
    with pytest.raises(CheckpointError, match="was not written by qprune"):
        qprune.load(path, build)
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="it is a pickle"):
        load_packed(tmp_path / "pickle", build)
    with pytest.raises(CheckpointError, match="No such file"):
        load_packed(tmp_path / "nothing", build)
    path.write_bytes(path.read_bytes().replace(b"qprune-packed/1", b"qprune-packed/7"))
    with pytest.raises(CheckpointError, match="has packed format 7; this version of qprune reads format 1"):
        load_packed(path, build)


@functools.cache
def packed_bytes() -> bytes:
    net, _ = coded(False)
    with tempfile.TemporaryDirectory() as folder:
        save_packed(net, Path(folder) / "net")
        return (Path(folder) / "net").read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_always_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = packed_bytes()
    raw = bytearray(whole)
    kind = data.draw(st.sampled_from(["cut", "flip", "header", "insert", "zero"]))
    header = int.from_bytes(raw[:8], "little") + 8
    if kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "insert":
        raw[(place := data.draw(st.integers(0, len(raw)))) : place] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "zero":
        start = data.draw(st.integers(0, len(raw) - 1))
        raw[start : start + 64] = bytes(len(raw[start : start + 64]))
    else:
        place = data.draw(st.integers(0, (header if kind == "header" else len(raw)) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw)
    _, build = coded(False)
    try:
        again = load_packed(path, build)
    except CheckpointError:
        return
    # what is not content, the blanks of a header, may differ
    net, _ = coded(False)
    assert kind in ("flip", "header", "zero") and torch.equal(again(X), net(X))


def with_content(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Another header and other tensors, with the right checksum."""
    _, tensors = packed.read(path)
    structure = json.loads(zlib.decompress(tensors.pop("packed.header").numpy().tobytes()))
    tensors.pop("packed.sha256")
    change(structure, tensors)
    tensors.setdefault("packed.header", packed._bytes(zlib.compress(json.dumps(structure).encode())))
    tensors["packed.sha256"] = packed._digest(tensors)
    save_file(tensors, path, {"format": "qprune-packed/1"})


def resized(name: str, by: int) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]:
    return lambda h, t: t.update({name: torch.cat([t[name], torch.zeros(by, dtype=torch.uint8)]) if by > 0 else t[name][:by].clone()})


def index_of(layer: str, **fields: int) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]:
    places = {"entries": 0, "kept": 1, "coding": 2, "bits": 3, "width": 4}

    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, value in fields.items():
            header["books"][layer][0][places[name]] = value

    return change


CONTENTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "fewer codes": (resized("packed.codes", -1), "ends before"),
    "more codes": (resized("packed.codes", 1), "bits more than expected"),
    "no codes": (lambda h, t: t.pop("packed.codes"), "ends before"),
    "codes of floats": (lambda h, t: t.update({"packed.codes": t["packed.codes"].float()}), "ends before"),
    "fewer codebooks": (resized("packed.codebooks", -4), "ends before"),
    "no bias": (lambda h, t: t.pop("state.0.bias"), "missing tensor '0.bias'"),
    "another tensor": (lambda h, t: t.update({"state.9.bias": torch.zeros(1)}), "unexpected tensor '9.bias'"),
    "another shape": (lambda h, t: t.update({"state.0.bias": torch.zeros(9)}), r"0.bias has shape \(9,\) in the file, \(8,\) here"),
    "another type": (lambda h, t: t.update({"state.0.bias": torch.zeros(8, dtype=torch.int32)}), "0.bias is torch.int32 in the file"),
    "no header": (lambda h, t: t.update({"packed.header": torch.zeros(3)}), "it is missing, cut short"),
    "half a header": (lambda h, t: t.update({"packed.header": packed._bytes(zlib.compress(b"{}" * 99)[:9])}), "header is damaged"),
    "list as header": (lambda h, t: t.update({"packed.header": packed._bytes(zlib.compress(b"[1]"))}), "expected an object, got list"),
    "nested header": (lambda h, t: t.update({"packed.header": packed._bytes(zlib.compress(b"[" * 9**6))}), "header is damaged"),
    "no books": (lambda h, t: h.pop("books"), "no index for layer '0'"),
    "list of books": (lambda h, t: h.update(books=[1]), "header is damaged"),
    "no policy": (lambda h, t: h.pop("policy"), "header is damaged"),
    "policy of numbers": (lambda h, t: h.update(policy=7), "header is damaged|not a policy"),
    "many entries": (index_of("2", entries=10**15), "an index of 1000000000000000 entries"),
    "no entries": (index_of("2", entries=0), "an index of 0 entries"),
    "many kept": (index_of("2", kept=10**15), "expected 1000000000000000"),
    "many bits": (index_of("2", bits=10**15), "ends before|1000000000000000|more than expected"),
    "wide": (index_of("2", coding="gaps", width=60), "header is damaged"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_does_not_fit(case: str, tmp_path: Path) -> None:
    path, (change, message) = tmp_path / "net", CONTENTS[case]
    path.write_bytes(packed_bytes())
    with_content(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_packed(path, coded(False)[1])


def test_a_header_that_inflates_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    path.write_bytes(packed_bytes())
    with_content(path, lambda h, t: h.update(filler=" " * 10**6))
    monkeypatch.setattr(packed, "_MOST_HEADER", 10**5)
    with pytest.raises(CheckpointError, match="more than 100000 bytes"):
        load_packed(path, coded(False)[1])
