"""Mixed and fixed layers as modules: what a layer that takes the place of nn.Conv2d must survive."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.gates import Gate, set_gates
from qprune.nn import MixedActivation, MixedConv2d, MixedLinear, QuantConv2d, QuantLinear
from qprune.space import SearchSpace


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MixedConv2d": (lambda: MixedConv2d(3, 4, 3, w_bits=(0, 2, 8), a_bits=(4, 8), granularity="filter"), (2, 3, 6, 6)),
    "MixedConv2d-joint": (lambda: MixedConv2d(4, 4, 3, w_bits=(0, 2), a_bits=(4, 8), joint=True, groups=2), (2, 4, 6, 6)),
    "MixedLinear": (lambda: MixedLinear(6, 4, w_bits=(1, 4), input_quantizer="lsq+"), (5, 6)),
    "MixedActivation": (lambda: MixedActivation((0, 2, 4), channels=3), (2, 3, 4, 4)),
    "QuantConv2d": (lambda: QuantConv2d(3, 4, 3, w_bits=(0, 2, 2, 8), a_bits=4), (2, 3, 6, 6)),
    "QuantLinear": (lambda: QuantLinear(6, 4, w_bits=4, a_bits=8), (5, 6)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


@EVERY
def test_every_parameter_has_a_gradient(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    for mode in ("relaxed", "sampled", "fixed"):
        set_gates(layer, mode)
        layer.zero_grad()
        layer(x).sum().backward()
        assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("bits", [(0,), (1,), (32,), (0, 1), (0, 32)], ids=str)
def test_every_parameter_has_a_gradient_for_special_bits(bits: tuple[int, ...]) -> None:
    for options in ({"w_bits": bits}, {"a_bits": bits}, {"w_bits": bits, "a_bits": bits, "joint": True, "input_quantizer": "lsq+"}):
        layer = MixedConv2d(3, 4, 3, **options)  # type: ignore[arg-type]
        layer(torch.randn(2, 3, 6, 6)).sum().backward()
        assert [n for n, p in layer.named_parameters() if p.grad is None] == [], options


@EVERY
def test_no_host_sync(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor was read back to the host")

    with monkeypatch.context() as patch:
        for reader in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, reader, refuse)
        for _ in range(2):  # the first call calibrates
            layer(x).sum().backward()


@EVERY
def test_compiles_whole_from_the_first_call(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got, want = compiled(x), eager(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
    for (n, p), q in zip(layer.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, n=n: f"{n}: {text}")
    state = eager.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@EVERY
def test_copies_and_files(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    layer(x).sum().backward()
    for gate in (m for m in layer.modules() if isinstance(m, Gate)):
        gate.logits.data.normal_()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = LAYERS[name][0]()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
        assert torch.equal(twin(x), layer(x)) and twin.training
        assert torch.equal(twin.eval()(x), layer(x))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moves_to_another_dtype(name: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    want = layer(x)
    layer.to(dtype)
    got = layer(x.to(dtype))
    assert got.dtype == dtype
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == dtype for p in layer.parameters())
    tolerance = 1e-5 if dtype == torch.float64 else 0.15
    assert (got - want).abs().mean() < tolerance * want.abs().mean()


@EVERY
def test_autocast(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()


@EVERY
def test_nan_in_nan_out(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    layer(x)
    x[(0,) * x.dim()] = torch.nan
    y = layer(x)
    assert y[(0, ...)].isnan().any() and not y[(1, ...)].isnan().any()


@EVERY
def test_mode_and_repetition(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    start = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    assert all(torch.equal(value, start[key]) for key, value in layer.state_dict().items()), "eval learns nothing"
    layer.train()(x)
    quantizer = layer.quantizer if name == "MixedActivation" else layer.input_quantizer
    assert quantizer.calibrated and quantizer.started == 1
    state = copy.deepcopy(layer.state_dict())
    layer(10 * x)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items()), "only the first batch calibrates"
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("name", ["MixedConv2d", "MixedConv2d-joint", "QuantConv2d", "MixedActivation"])
def test_images(name: str) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    last = x.contiguous(memory_format=torch.channels_last)
    y, z = layer(x), layer(last)
    torch.testing.assert_close(y, z)
    assert y.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
    if name != "MixedActivation":
        torch.testing.assert_close(layer(x[0]), y[0])
        assert layer(x[:0]).shape == (0, *y.shape[1:])


CLASSES = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda **o: MixedConv2d(3, 4, 3, **o), id="MixedConv2d"),
        pytest.param(lambda **o: MixedLinear(6, 4, **o), id="MixedLinear"),
        pytest.param(lambda **o: QuantConv2d(3, 4, 3, **o), id="QuantConv2d"),
        pytest.param(lambda **o: QuantLinear(6, 4, **o), id="QuantLinear"),
    ],
)


def float_layer(layer: nn.Module, **options: Any) -> Any:
    return nn.Conv2d(3, 4, 3, **options) if isinstance(layer, nn.Conv2d) else nn.Linear(6, 4, **options)


def some_input(layer: nn.Module) -> Tensor:
    return torch.randn(2, 3, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(5, 6)


@CLASSES
def test_is_the_plain_layer(make: Any) -> None:
    torch.manual_seed(1)
    layer = make(bias=False)
    torch.manual_seed(1)
    plain = float_layer(layer, bias=False)
    assert isinstance(layer, type(plain)) and layer.bias is None
    assert torch.equal(layer.weight, plain.weight), "the same random start"
    assert {"weight"} <= set(layer.state_dict()) and "bias" not in layer.state_dict()
    for name in plain.__constants__:
        assert getattr(layer, name) == getattr(plain, name)
    assert plain.extra_repr() in repr(layer)


def test_positional_arguments() -> None:
    arguments: Any = (4, 6, 3, 2, 1, 1, 2, False, "reflect")
    assert MixedConv2d(*arguments).extra_repr() == nn.Conv2d(*arguments).extra_repr()
    assert QuantConv2d(*arguments).extra_repr().startswith(nn.Conv2d(*arguments).extra_repr())
    assert MixedLinear(4, 6, False).bias is None and QuantLinear(4, 6, False).bias is None
    assert MixedConv2d(3, 4, kernel_size=(3, 1), padding="same")(input=torch.randn(1, 3, 5, 5)).shape == (1, 4, 5, 5)


@CLASSES
def test_device_and_dtype(make: Any) -> None:
    layer = make(dtype=torch.float64)
    assert layer.weight.dtype == torch.float64 and layer(some_input(layer).double()).dtype == torch.float64
    meta = make(device="meta", dtype=torch.bfloat16)
    assert all(value.is_meta for value in [*meta.parameters(), *meta.buffers()])
    real = meta.to_empty(device="cpu")
    real.load_state_dict(make(dtype=torch.bfloat16).state_dict(), strict=True)
    assert real.weight.dtype == torch.bfloat16 and real.weight.device.type == "cpu"


@CLASSES
def test_float_state_loads_strictly_and_restarts_the_ranges(make: Any) -> None:
    layer = make()
    plain, x = float_layer(layer), some_input(layer)
    plain.weight.data.mul_(100)
    layer(x)
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(layer.weight, plain.weight)
    assert (layer.weight_quantizer.log_range > first["weight_quantizer.log_range"] + 2).all()
    layer.eval()(1000 * x)
    assert torch.equal(layer.input_quantizer.log_range, first["input_quantizer.log_range"])
    layer.train()(1000 * x)
    torch.testing.assert_close(layer.input_quantizer.log_range, first["input_quantizer.log_range"] + 6.9078, rtol=1e-3, atol=0)


@CLASSES
def test_other_states(make: Any) -> None:
    layer = make()
    x = some_input(layer)
    layer(x)
    layer.weight_quantizer.log_range.data += 1
    state = copy.deepcopy(layer.state_dict())
    twin = make()
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin(3 * x), layer(3 * x)), "ranges are loaded, not calibrated again"
    layer.load_state_dict({}, strict=False)
    layer.load_state_dict({"bias": layer.bias}, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items()) and layer.input_quantizer.calibrated
    early, late = make(), make()
    late.load_state_dict(early.state_dict(), strict=True)
    assert torch.equal(late(9 * x), early(9 * x)), "a state from before calibration is calibrated"
    for wrong in ({**state, "weight": state["weight"][1:]}, {**state, "more": x}, {"weight": state["weight"]}):
        with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key|Missing key"):
            make().load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_quantizer\.log_range"):
        make().load_state_dict({**state, "weight_quantizer.log_range": torch.zeros(7, 3)})


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_from_float_loses_nothing(kind: str) -> None:
    plain: Any = nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular") if kind == "conv" else nn.Linear(6, 4)
    calls: list[str] = []
    plain.register_forward_pre_hook(lambda *a: calls.append("before"))
    plain.register_forward_hook(lambda *a: calls.append("after"))
    plain.register_full_backward_hook(lambda *a: calls.append("backward"))
    plain.register_buffer("mask", torch.ones(3), persistent=False)
    plain.note, plain.weight.tag = {"a": 1}, "mine"
    plain.bias.requires_grad_(False)
    plain.eval()
    before, keys = copy.deepcopy(plain.__dict__), set(plain.state_dict())
    cls: Any = MixedConv2d if kind == "conv" else MixedLinear
    mixed = cls.from_float(plain, SearchSpace())
    assert mixed.weight is plain.weight and mixed.bias is plain.bias and mixed.mask is plain.mask and mixed.note is plain.note
    assert mixed.extra_repr() == plain.extra_repr() and not mixed.bias.requires_grad and mixed.weight.tag == "mine"
    assert not any(module.training for module in mixed.modules())
    assert "mask" not in mixed.state_dict() and keys < set(mixed.state_dict())
    x = torch.randn(2, 3, 6, 6) if kind == "conv" else torch.randn(2, 6)
    mixed(x.requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    assert set(plain.__dict__) == set(before) and set(plain.state_dict()) == keys, "the float layer is as it was"
    assert plain._non_persistent_buffers_set == {"mask"} and set(plain._modules) == set()


@CLASSES
def test_refuses_inputs(make: Any) -> None:
    layer = make()
    name, conv = type(layer).__name__, isinstance(layer, nn.Conv2d)
    x = some_input(layer)
    with pytest.raises(InputError, match=rf"^layer {name}: the input must be floating point, got torch.uint8: convert it with x.float"):
        layer(x.to(torch.uint8))
    with pytest.raises(InputError, match=rf"^layer {name}: expected an input of rank .*, got shape \(.*\)$"):
        layer(x.reshape(1, 1, *x.shape) if conv else torch.tensor(1.0))
    with pytest.raises(InputError, match=rf"^layer {name}: expected {x.size(1 if conv else -1)} input channels in dimension -[13], got "):
        layer(x[:, :2])


def test_activation_refuses_inputs() -> None:
    with pytest.raises(InputError, match=r"^layer MixedActivation: expected 3 input channels in dimension 1, got shape \(2, 4, 5, 5\)$"):
        MixedActivation(channels=3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(InputError, match=r"^layer MixedActivation: expected an input of rank .*, got shape \(4,\)$"):
        MixedActivation()(torch.randn(4))
