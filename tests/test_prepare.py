"""prepare: any network, any nesting, any rules; what is swapped, what is left alone, and what is said."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qprune
from qprune.errors import InputError, RuleError, UnsupportedLayerError
from qprune.nn import MixedConv2d, MixedLinear
from qprune.prepare import prepare, quantizer_parameters
from qprune.record import record_of
from qprune.space import SearchSpace
from qprune.wrappers import unwrap

SPACE = SearchSpace((0, 2, 4), (4, 8), granularity="filter")
FIXED = SearchSpace.fixed(8, 8)
IMAGE = torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Control flow, a ModuleList, a ModuleDict, a shared layer under two names, two layers with one weight, keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)
        )
        self.paths = nn.ModuleDict({"wide": nn.Conv2d(4, 4, 1), "deep": nn.Conv2d(4, 4, 1)})
        self.paths["deep"].weight = self.paths["wide"].weight
        self.again = self.blocks[0]
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.fc = nn.Linear(4, 5)
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0, deep: bool = True) -> Tensor:
        self.calls += 1
        x = self.bn1(self.conv1(x)).relu()
        for block in self.blocks:
            x = block(x) + x
        if x.mean() > -1e9:
            x = self.again(x)
        x = self.paths["deep" if deep else "wide"](x)
        return self.fc(self.up(x).mean((2, 3))) * scale


LAYERS = ["conv1", "blocks.0.0", "blocks.1.0", "paths.wide", "paths.deep", "fc"]


def mixed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MixedConv2d | MixedLinear)]


@pytest.fixture(params=[None, IMAGE, (IMAGE,), [IMAGE, 2.0], {"x": IMAGE, "deep": False}], ids=["none", "tensor", "tuple", "list", "dict"])
def example(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_swaps_every_layer_and_changes_nothing_of_the_model(example: Any) -> None:
    net = Net()
    state, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    numbers = torch.get_rng_state()
    model = prepare(net, SPACE, example_inputs=example)
    assert mixed_names(model) == LAYERS
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert list(net.modules()) == modules and net.calls == 0 and record_of(net) is None
    assert not any(p is q for p in net.parameters() for q in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items()), "also the statistics of BatchNorm"
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in [*net.parameters(), *model.parameters()])
    record = record_of(model)
    assert record is not None and (record.geometry is None) == (example is None)
    assert type(model.up) is nn.ConvTranspose2d
    model(IMAGE, deep=False).sum().backward()
    assert model.blocks[0][0].weight.grad is not None


def test_sharing_survives() -> None:
    model = prepare(Net(), SPACE, example_inputs=IMAGE)
    assert model.again is model.blocks[0]
    assert model.paths["deep"].weight is model.paths["wide"].weight
    shared = nn.Conv2d(3, 3, 1)
    model = prepare(nn.Sequential(shared, nn.ReLU(), shared), SPACE, example_inputs=IMAGE)
    assert model[0] is model[2] and isinstance(model[0], MixedConv2d)


@pytest.mark.parametrize("root", [nn.Conv2d(3, 4, 3), nn.Linear(8, 4)], ids=["conv", "linear"])
def test_root_may_be_a_layer(root: nn.Module) -> None:
    model = prepare(root, SPACE, rules={"": FIXED}, example_inputs=IMAGE)
    assert isinstance(model, MixedConv2d | MixedLinear) and model.space == FIXED
    assert model(IMAGE).shape == root(IMAGE).shape


def test_modes_frozen_parameters_hooks_and_attributes_are_kept() -> None:
    net, calls = Net().eval(), []
    net.bn1.train()
    net.conv1.weight.requires_grad_(False)
    net.conv1.register_forward_hook(lambda *a: calls.append("conv1"))
    net.conv1.note = "mine"
    model = prepare(net, SPACE, example_inputs=IMAGE)
    assert [n for n, m in model.named_modules() if m.training] == ["bn1"] == [n for n, m in net.named_modules() if m.training]
    assert not model.conv1.weight.requires_grad and model.conv1.bias.requires_grad and model.conv1.note == "mine"
    calls.clear()
    model(IMAGE)
    assert calls == ["conv1"]
    assert all(module.training for module in prepare(Net(), SPACE, example_inputs=IMAGE).modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = prepare(Net().to(dtype), SPACE, example_inputs=IMAGE.to(dtype))
    assert model.conv1.weight.dtype == dtype and model(IMAGE.to(dtype)).dtype == dtype


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: torch.zeros(2, 4, 6, 6)  # type: ignore[method-assign]
    return conv


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", amount=0.5)


OWN_CODE = {
    "subclass": lambda: Scaled(3, 4, 3),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    "pruned": pruned,
    "patched forward": patched,
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.Unflatten(2, (62, 1)))[1],
}


@pytest.mark.parametrize("kind", OWN_CODE)
def test_layers_with_code_of_their_own_stay(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qprune")
    layer, image = OWN_CODE[kind](), IMAGE.flatten(2) if kind == "1d" else IMAGE
    net = nn.Sequential(layer).eval()
    model = prepare(net, SPACE, example_inputs=image)
    assert type(model[0]) is type(layer) and mixed_names(model) == []
    assert torch.equal(model(image), net(image))
    assert kind == "transposed" or any(record.getMessage().startswith("qprune: layer 0: ") for record in caplog.records)
    with pytest.raises(UnsupportedLayerError, match=r"^layer 0: .*cannot be mixed"):
        prepare(net, SPACE, rules={"0": FIXED})
    prepare(net, SPACE, rules={"0": None})


def test_lazy_layers() -> None:
    def lazy() -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    net = lazy()
    model = prepare(net, SPACE, example_inputs=IMAGE)
    assert mixed_names(model) == ["0", "3"] and model(IMAGE).shape == (2, 2)
    assert nn.parameter.is_lazy(net[0].weight), "the given model stays lazy"
    with pytest.raises(UnsupportedLayerError, match=r"^layer 0: LazyConv2d has no shape yet: give prepare example_inputs$"):
        prepare(lazy(), SPACE)


def test_rules() -> None:
    two, four = SearchSpace.fixed(2, 2), SearchSpace.fixed(4, 4)
    model = prepare(Net(), SPACE, rules={"blocks.*": two, "blocks.1.*": four, "blocks.0.0": FIXED, "fc": None, "*.wide": four})
    assert model.blocks[0][0].space == FIXED, "a name goes before patterns, wherever it stands"
    assert model.blocks[1][0].space == two, "the first pattern counts"
    assert type(model.fc) is nn.Linear and model.paths["wide"].space == four and model.paths["deep"].space == SPACE
    record = record_of(model)
    assert record is not None
    fixed = {name: bits and (bits.w_bits, bits.a_bits) for name, bits in record.fixed.items()}
    assert fixed == {"blocks.0.0": (8, 8), "blocks.1.0": (2, 2), "paths.wide": (4, 4), "fc": None, "up": None}
    assert mixed_names(prepare(Net(), SPACE, rules={"*": None})) == []


CANNOT = "cannot be mixed (only nn.Conv2d and nn.Linear can, not subclasses); it stays float"
HOLDS = "holds layers but is none; for all of them, use the pattern"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"conv_1": FIXED}, "rule 'conv_1' matches no layer; did you mean 'conv1'?"),
        ({"block*.0.9": None}, "rule 'block*.0.9' matches no layer; did you mean 'blocks.0.0'?"),
        ({"xyz": FIXED}, "rule 'xyz' matches no layer; the layers are conv1, blocks.0.0, blocks.1.0, paths.wide, paths.deep, up, fc"),
        ({"again.0": FIXED}, "rule 'again.0' names a layer that is shared: use its first name 'blocks.0.0'"),
        ({"conv1": 8}, "rule 'conv1': expected a SearchSpace or None, got int"),
        ({"blocks.*": (2, 4)}, "rule 'blocks.*': expected a SearchSpace or None, got tuple"),
        ({"bn1": FIXED}, f"layer bn1: BatchNorm2d {CANNOT}"),
        ({"up": FIXED}, f"layer up: ConvTranspose2d {CANNOT}"),
        ({"blocks": FIXED}, f"layer blocks: ModuleList {HOLDS} 'blocks.*'"),
        ({"blocks.0": None}, f"layer blocks.0: Sequential {HOLDS} 'blocks.0.*'"),
    ],
)
def test_refuses_rules(rules: Any, message: str) -> None:
    with pytest.raises(UnsupportedLayerError if message.startswith("layer") else RuleError, match=f"^{re.escape(message)}$"):
        prepare(Net(), SPACE, rules=rules)


def test_refuses_other_arguments() -> None:
    with pytest.raises(RuleError, match=r"^prepare: space must be a SearchSpace, got tuple$"):
        prepare(Net(), (2, 4))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^example_inputs: expected a tensor, a tuple of arguments or a dict of keywords, got int$"):
        prepare(Net(), SPACE, example_inputs=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE.to(torch.uint8), r"layer conv1: the input must be floating point, got torch\.uint8: convert it with x\.float\(\) first"),
        (torch.randn(8), r"layer conv1: expected an input of rank 3 or 4, got shape \(8,\)"),
        (torch.randn(2, 1, 8, 8), r"layer conv1: expected 3 input channels in dimension -3, got shape \(2, 1, 8, 8\)"),
    ],
    ids=["integers", "rank", "channels"],
)
def test_bad_inputs_name_the_layer(image: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        prepare(Net(), SPACE, example_inputs=IMAGE)(image)


def test_prepare_twice() -> None:
    first = prepare(Net(), SPACE, rules={"conv1": FIXED}, example_inputs=IMAGE)
    first.fc.weight_gate.logits.data.fill_(3)
    first.paths["deep"].register_buffer("mask", torch.ones(4))
    second = prepare(first, SearchSpace(), rules={"blocks.*": FIXED, "paths.deep": None}, example_inputs=IMAGE)
    assert second.conv1.space == FIXED and second.fc.space == SPACE and (second.fc.weight_gate.logits == 3).all(), "as they were"
    assert second.blocks[0][0].space == FIXED and type(second.paths["deep"]) is nn.Conv2d, "as the rules say"
    assert set(second.paths["deep"].state_dict()) == {"weight", "bias", "mask"} and "space" not in second.paths["deep"].__dict__
    assert second(IMAGE).shape == (2, 5)


def test_parameters_are_partitioned() -> None:
    model = prepare(Net(), SPACE, rules={"conv1": FIXED, "fc": None})
    model.gate = nn.Module()
    model.gate.register_parameter("logits", nn.Parameter(torch.zeros(3)))
    arch, weights = qprune.arch_parameters(model), qprune.weight_parameters(model)
    assert {id(p) for p in arch} | {id(p) for p in weights} == {id(p) for p in model.parameters()}
    assert len(arch) + len(weights) == len(list(model.parameters()))
    names = [name for name, p in model.named_parameters() if any(p is q for q in arch)]
    assert len(names) == 8 and all(re.fullmatch(r"(blocks|paths)\..*_gate\.logits", name) for name in names)
    assert len(quantizer_parameters(model)) == 10 and {id(p) for p in quantizer_parameters(model)} < {id(p) for p in weights}


def test_float_state_of_a_network_loads_strictly() -> None:
    net, model = Net(), prepare(Net(), SPACE, example_inputs=IMAGE)
    model(IMAGE)
    for p in net.parameters():
        p.data.mul_(50)
    model.load_state_dict(net.state_dict(), strict=True)
    fresh = prepare(net, SPACE, example_inputs=IMAGE)
    assert all(torch.equal(a.weight_quantizer.log_range, b.weight_quantizer.log_range) for a, b in zip(layers_of(model), layers_of(fresh)))
    assert not any(layer.input_quantizer.calibrated for layer in layers_of(model))
    torch.testing.assert_close(model(IMAGE), fresh(IMAGE))
    twin = prepare(Net(), SPACE, example_inputs=IMAGE)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.eval()(IMAGE), model.eval()(IMAGE))


def layers_of(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, MixedConv2d | MixedLinear))


def test_wrapped_models() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    compiled = torch.compile(net, backend="eager")
    model = prepare(compiled, SPACE, example_inputs=IMAGE)  # type: ignore[arg-type]
    assert type(model) is nn.Sequential and mixed_names(model) == ["0", "2"]
    wrapped: Any = torch.compile(model, backend="eager")
    assert unwrap(wrapped) is model and record_of(wrapped) is record_of(model)
    assert len(qprune.arch_parameters(wrapped)) == 4
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert unwrap(parallel) is model
        for _ in range(2):
            parallel(IMAGE).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert mixed_names(prepare(parallel, SPACE)) == ["0", "2"]
    finally:
        torch.distributed.destroy_process_group()
