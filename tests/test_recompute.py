"""A mixed input that is made again in the backward pass: the same numbers, and nothing kept but x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune import Budget, Search, SearchSpace, convert, prepare
from qprune.gates import Gate
from qprune.nn import MixedConv2d

FACTORISED = SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter")
JOINT = SearchSpace((2, 4, 8), (2, 4, 8), joint=True, granularity="filter")
LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], SearchSpace]] = {
    "factorised": ((6, 8, 3), {"padding": 1, "bias": False}, FACTORISED),
    "bias, stride": ((6, 8, 3), {"stride": 2, "padding": 1}, FACTORISED),
    "groups": ((6, 9, 3), {"groups": 3}, FACTORISED),
    "depthwise": ((6, 6, 3), {"groups": 6}, FACTORISED),
    "joint": ((6, 8, 3), {"padding": 1}, JOINT),
    "joint, groups": ((6, 9, 3), {"groups": 3}, JOINT),
    "learned offset": ((6, 8, 1), {}, SearchSpace((2, 4), (4, 8), input_quantizer="lsq+")),
}


def _layer(name: str, dtype: torch.dtype = torch.float32) -> tuple[MixedConv2d, Tensor]:
    arguments, options, space = LAYERS[name]
    layer = MixedConv2d(*arguments, **options, space=space).to(dtype)
    for module in layer.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.logits)
    x = torch.randn(2, 6, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    layer.input_quantizer.calibrate(x)
    return layer, x


def _results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_results(name: str, autocast: bool) -> None:
    layer, x = _layer(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        want = _results(layer, x)
        layer.recompute = True
        got = _results(layer, x)
    assert got.keys() == want.keys() == {"y", "x", *(n for n, _ in layer.named_parameters())}
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_float64() -> None:
    layer, x = _layer("factorised", torch.float64)
    want = _results(layer, x)
    layer.recompute = True
    for key, value in _results(layer, x).items():
        torch.testing.assert_close(value, want[key])


@pytest.mark.parametrize(("name", "mixed"), [("factorised", 1), ("joint", 3)])
def test_keeps_no_mixed_input(name: str, mixed: int) -> None:
    layer, x = _layer(name)

    def kept() -> int:
        sizes: dict[int, int] = {}
        alive: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            alive.append(t)
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(sizes.values())

    before = kept()
    layer.recompute = True
    assert before - kept() == mixed * x.nbytes


def test_only_the_gradients_that_are_wanted() -> None:
    layer, x = _layer("bias, stride")
    layer.recompute = True
    want = _results(layer, x)
    for p in layer.parameters():
        p.requires_grad_(False)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    torch.testing.assert_close(layer.bias.grad, want["bias"])
    assert layer.weight.grad is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("name", ["factorised", "joint"])
def test_compiles_as_one_graph(name: str) -> None:
    layer, x = _layer(name)
    layer.recompute = True
    want = _results(layer, x)
    got = _results(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    for key, value in want.items():
        torch.testing.assert_close(got[key.replace("_orig_mod.", "")] if key in got else got[f"_orig_mod.{key}"], value)


def test_a_search_sets_it_and_the_result_does_not_have_it() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model = prepare(net, FACTORISED, rules={"4": None}, example_inputs=x)
    search = Search(model, Budget(bops="w4a4"), recompute=True)
    assert [module.recompute for module in model.modules() if isinstance(module, MixedConv2d)] == [True, True]
    search.step(lambda m: F.cross_entropy(m(x), y))
    final = convert(model, search.policy())
    assert not any("recompute" in module.__dict__ for module in final.modules())
