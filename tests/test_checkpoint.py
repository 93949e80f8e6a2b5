"""One file per network: everything comes back, and every file that cannot be read says why."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qprune import CheckpointError, Policy, SearchSpace, convert, cost, load, prepare, save
from qprune._version import __version__
from qprune.checkpoint import policy_of
from qprune.convert import converted
from qprune.cost import geometry_of
from qprune.tasks import models

X = torch.randn(2, 1, 16, 16)


def build() -> nn.Module:
    return models.resnet8(in_channels=1)


def final_model(space: str = "lsq-per-filter", per_filter: bool = True) -> nn.Module:
    return copy.deepcopy(_final_model(SPACES[space], per_filter))


@functools.cache
def _final_model(space: SearchSpace, per_filter: bool) -> nn.Module:
    mixed = prepare(build(), space, {"fc": None}, example_inputs=X)
    mixed.train()(torch.randn(8, 1, 16, 16))
    layers: dict[str, Any] = {}
    for name, layer in geometry_of(mixed).layers.items():
        if name != "fc":
            bits = tuple(space.w_bits[(f + len(layers)) % len(space.w_bits)] for f in range(layer.filters))
            layers[name] = (bits if per_filter else space.w_bits[-1], space.a_bits[len(layers) % len(space.a_bits)])
    final = convert(mixed, Policy(layers, geometry_of(mixed)))
    final.train()(torch.randn(8, 1, 16, 16))
    return final.eval()


SPACES = {
    "lsq-per-filter": SearchSpace((0, 2, 4, 8), (4, 8), granularity="filter"),
    "symmetric-layer-scales": SearchSpace((2, 4), (4, 32), granularity="filter", weight_quantizer="symmetric", scales="layer"),
    "dorefa-lsq+": SearchSpace((1, 3, 32), (2, 3), granularity="filter", weight_quantizer="dorefa", input_quantizer="lsq+"),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("per_filter", [True, False], ids=["filters", "layers"])
def test_round_trip(space: str, per_filter: bool, tmp_path: Path) -> None:
    final = final_model(space, per_filter)
    save(final, tmp_path / "runs" / "net.safetensors")
    again = load(str(tmp_path / "runs" / "net.safetensors"), build).eval()
    assert torch.equal(again(X), final(X))
    assert policy_of(again) == policy_of(final)
    assert float(cost(again).bops) == float(cost(final).bops)
    assert again.state_dict().keys() == final.state_dict().keys()
    names = {n: m.space.quantizers for n, m in final.named_modules() if hasattr(m, "space")}
    assert {n: m.space.quantizers for n, m in again.named_modules() if hasattr(m, "space")} == names


def test_second_generation_is_the_same_file(tmp_path: Path) -> None:
    save(final_model(), tmp_path / "a")
    save(load(tmp_path / "a", build), tmp_path / "b")
    again = load(tmp_path / "b", build)
    assert policy_of(again).geometry == policy_of(load(tmp_path / "a", build)).geometry is not None
    first, second = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_float_model_and_training_goes_on(tmp_path: Path) -> None:
    net = build().eval()
    save(net, tmp_path / "float")
    assert torch.equal(load(tmp_path / "float", build).eval()(X), net(X))
    save(final_model(), tmp_path / "net")
    again = load(tmp_path / "net", build).train()
    before = {n: p.clone() for n, p in again.named_parameters() if n.endswith("log_range")}
    again(100 * X).square().mean().backward()
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters() if n in before), "ranges are not calibrated again"


def test_wrappers_and_half_precision(tmp_path: Path) -> None:
    final = final_model()
    save(torch.compile(final, backend="eager"), tmp_path / "compiled")
    assert torch.equal(load(tmp_path / "compiled", build).eval()(X), final(X))
    save(nn.DataParallel(final), tmp_path / "parallel")
    assert torch.equal(load(tmp_path / "parallel", build).eval()(X), final(X))
    save(build().to(torch.bfloat16), tmp_path / "half")
    loaded = load(tmp_path / "half", lambda: build().to(torch.bfloat16))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_model_that_is_still_searched_is_refused(tmp_path: Path) -> None:
    mixed = prepare(build(), SearchSpace(), example_inputs=X)
    with pytest.raises(CheckpointError, match=r"layer 'conv1' still has candidates; convert\(model, policy\) first"):
        save(mixed, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def with_header(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Write the file again with another header."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    change(header)
    save_file(load_file(path), path, header)


def drop_layer(header: dict[str, str]) -> None:
    policy = json.loads(header["policy"])
    policy["layers"].pop("conv1")
    header["policy"] = json.dumps(policy)


HEADERS: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "newer": (
        lambda h: h.update(version="3", library="9.9"),
        r"has format 3, written by qprune 9\.9; this is qprune .*, which reads formats 1 and 2",
    ),
    "strange removal": (lambda h: h.update(removal='{"removed": 3, "round_to": 1}'), "header is damaged"),
    "removal by halves": (lambda h: h.update(removal='{"removed": true}'), "header is damaged"),
    "zeros instead of nothing": (
        lambda h: h.update(removal='{"removed": false, "round_to": 1}'),
        "does not fit this network: .*size mismatch",
    ),
    "foreign": (lambda h: h.update(format="pt"), "was not written by qprune"),
    "no policy": (lambda h: h.pop("policy"), "header is damaged"),
    "half a policy": (lambda h: h.update(policy=h["policy"][:99]), "not a policy file"),
    "newer policy": (lambda h: h.update(policy=h["policy"].replace('"format": 1', '"format": 7')), "the policy has format 7"),
    "no quantizers": (lambda h: h.pop("quantizers"), "header is damaged"),
    "strange quantizers": (lambda h: h.update(quantizers='{"conv1": {"weight_quantizer": "best"}}'), "header is damaged"),
    "list of quantizers": (lambda h: h.update(quantizers="[1]"), "header is damaged"),
    "another policy": (drop_layer, "does not fit this network: .*conv1"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net"
    save(final_model(), path)
    return path.read_bytes()


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_fit(case: str, saved: bytes, tmp_path: Path) -> None:
    change, problem = HEADERS[case]
    path = tmp_path / "net"
    path.write_bytes(saved)
    with_header(path, change)
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(path, build)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "not a safetensors file, or damaged"),
        (b"hello", "not a safetensors file, or damaged"),
        (b"\xff" * 64, "not a safetensors file, or damaged"),
        (b"\x80\x04\x95\x05", r"it is a pickle \(torch.save\), which qprune never opens"),
    ],
    ids=["empty", "text", "noise", "pickle"],
)
def test_files_that_are_something_else(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cannot read .*net: {problem}"):
        load(path, build)


@pytest.mark.parametrize("low", [b"\x80", b"PK"], ids=["protocol", "zip"])
def test_a_file_that_begins_like_a_pickle(low: bytes, saved: bytes, tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, which may be any multiple of 8."""
    length = int.from_bytes(saved[:8], "little")
    longer = next(n for n in range(length, length + 2**17) if n.to_bytes(8, "little").startswith(low))
    path = tmp_path / "net"
    path.write_bytes(longer.to_bytes(8, "little") + saved[8 : 8 + length].ljust(longer) + saved[8 + length :])
    (tmp_path / "plain").write_bytes(saved)
    torch.testing.assert_close(load(path, build).state_dict(), load(tmp_path / "plain", build).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [4, 100, -1000, -1])
def test_truncated(keep: int, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(saved[:keep])
    with pytest.raises(CheckpointError, match="not a safetensors file, or damaged"):
        load(path, build)


def test_truncated_at_every_kind_of_place(saved: bytes, tmp_path: Path) -> None:
    """In the length of the header, around its ends, and at the ends of tensors."""
    start = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:start])
    ends = [start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    places = {1, 7, 8, 9, start // 2, start - 1, start, start + 1, *ends, *(end - 1 for end in ends)} - {len(saved)}
    path = tmp_path / "net"
    for place in sorted(places):
        path.write_bytes(saved[:place])
        with pytest.raises(CheckpointError, match="not a safetensors file, or damaged"):
            load(path, build)


def test_files_of_format_1(tmp_path: Path) -> None:
    """As versions before removal wrote them: pruned filters as zeros, and nothing said about them."""
    policy, spaces = policy_of(final_model()), SPACES["lsq-per-filter"]
    old = converted(build(), policy, spaces, None).eval()
    old(X)
    save(old, tmp_path / "net")
    with_header(tmp_path / "net", lambda h: h.pop("library"))
    with safe_open(tmp_path / "net", "pt") as file:
        assert file.metadata()["version"] == "1" and "removal" not in file.metadata()
    again = load(tmp_path / "net", build).eval()
    assert torch.equal(again(X), old(X))
    assert again.state_dict().keys() == old.state_dict().keys()
    assert [len(p) for p in again.parameters() if p.dim()] == [len(p) for p in old.parameters() if p.dim()]


def test_files_tell_who_wrote_them(saved: bytes) -> None:
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])["__metadata__"]
    assert (header["version"], header["library"], json.loads(header["removal"])) == ("2", __version__, {"removed": True, "round_to": 1})
    assert json.loads(header["policy"])["geometry"]["groups"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/qprune-bomb-went-off"),))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    torch.save({"model": Bomb(), "state": build().state_dict()}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="it is a pickle"):
        load(tmp_path / "net.pt", build)
    assert not Path("/tmp/qprune-bomb-went-off").exists()


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing: No such file or directory"):
        load(tmp_path / "nothing", build)
    with pytest.raises(CheckpointError, match="Is a directory"):
        load(tmp_path, build)


@pytest.mark.parametrize(
    "other",
    [
        lambda: models.resnet8(in_channels=1, num_classes=3),
        lambda: models.resnet8(in_channels=3),
        lambda: models.resnet20(in_channels=1),
        lambda: models.resnet8(in_channels=1, preactivation=True),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3)),
        lambda: nn.Identity(),
    ],
    ids=["classes", "channels", "resnet20", "preactivation", "sequential", "nothing"],
)
def test_another_network(other: Callable[[], nn.Module], saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(saved)
    with pytest.raises(CheckpointError, match="net does not fit this network: ") as caught:
        load(path, other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["file", "/proc", "/dev/null"])
def test_places_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    where = tmp_path / folder / "net" if folder == "file" else Path(folder) / "net"
    with pytest.raises(CheckpointError, match=f"cannot write .*{folder}/net: "):
        save(nn.Conv2d(1, 2, 3), where)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file(step: str, saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    path.write_bytes(saved)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*net: No space left on device"):
        save(nn.Conv2d(1, 2, 3), path)
    assert path.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(nn.Conv2d(1, 2, 3), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_one_layer_network(tmp_path: Path) -> None:
    final = convert(nn.Linear(3, 2), Policy({"": (4, 32)}))
    save(final, tmp_path / "net")
    x = torch.randn(4, 3)
    assert torch.equal(load(tmp_path / "net", lambda: nn.Linear(3, 2))(x), final(x))
