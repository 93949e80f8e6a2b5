"""Geometry of the example networks against published counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qprune.kernels import QPruneError
from qprune.tasks import data, models


def macs(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-accumulates per image of every convolution and linear layer, seen by hooks on a forward."""
    rows: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            rows[name] = out[0].numel() * module.weight[0].numel()

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize(
    "name, convolutions, filters, conv_macs",
    [("resnet8", 9, 336, 12_500_992), ("thin_resnet", 9, 336, 12_500_992), ("resnet20", 21, 784, 40_812_544)],
)
@pytest.mark.parametrize("preactivation", [False, True])
def test_resnet_convolutions(name: str, convolutions: int, filters: int, conv_macs: int, preactivation: bool) -> None:
    net = models.get(name)(num_classes=10, preactivation=preactivation)
    rows = macs(net, torch.randn(2, 3, 32, 32))
    fc = rows.pop("fc")
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert (len(rows), sum(layer.out_channels for layer in layers), sum(rows.values())) == (convolutions, filters, conv_macs)
    assert fc == 640


@pytest.mark.parametrize("name, mega_bops", [("resnet20", "41798.6"), ("resnet56", "128771.7")])
def test_preactivation_bit_operations(name: str, mega_bops: str) -> None:
    """32-bit bit operations of the pre-activation networks with 100 classes, as Single-path Bit Sharing (2101.04935) prints them."""
    net = models.get(name)(num_classes=100, preactivation=True)
    total = sum(macs(net, torch.randn(1, 3, 32, 32)).values())
    assert f"{total * 32 * 32 / 1e6:.1f}" == mega_bops


def test_layer_names() -> None:
    names = [name for name, layer in models.resnet8().named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert names == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.0.shortcut",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer3.0.shortcut",
        "fc",
    ]


def test_thin_resnet_is_resnet8() -> None:
    models.thin_resnet().load_state_dict(models.resnet8().state_dict())


@pytest.mark.parametrize("preactivation", [False, True])
def test_inputs_inside_the_resnet_are_non_negative(preactivation: bool) -> None:
    net = models.resnet8(preactivation=preactivation)
    signed: list[str] = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args, name=name: signed.append(name) if args[0].min() < 0 else None)
    net(torch.randn(4, 3, 16, 16))
    assert signed == ["conv1"]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("size, channels", [(16, 1), (28, 1), (32, 3)])
def test_shapes_and_gradients(name: str, size: int, channels: int) -> None:
    task = data.synthetic(in_channels=channels, image_size=size, num_classes=7, train=4, val=1, test=1)
    net = models.for_task(name, task)
    logits = net(task.train.x)
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not any(getattr(layer, "inplace", False) for layer in net.modules())


def test_mobilenet_has_depthwise_layers_and_linear_bottlenecks() -> None:
    net = models.mobilenet(in_channels=3)
    depthwise = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(depthwise) == 7
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    outputs: list[float] = []
    net.layer3[1].register_forward_hook(lambda module, args, out: outputs.append(out.min().item()))
    net(torch.randn(2, 3, 32, 32))
    assert outputs[0] < 0


def test_lenet5() -> None:
    weights = [parameter.numel() for parameter in models.lenet5(image_size=28).parameters() if parameter.dim() > 1]
    assert sum(weights) == 430_500
    with pytest.raises(QPruneError, match="at least 16 pixels, got image_size=12"):
        models.lenet5(image_size=12)
    with pytest.raises(QPruneError, match=r"image_size=32.*\(1, 1, 28, 28\)"):
        models.lenet5()(torch.zeros(1, 1, 28, 28))


def test_same_seed_same_weights() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(3)
        return list(models.resnet8().parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights()))


def test_unknown_names() -> None:
    with pytest.raises(models.ModelError, match=r"unknown model 'resnet9'; known models: resnet8, thin_resnet, resnet20") as caught:
        models.get("resnet9")
    assert isinstance(caught.value, QPruneError)
    task = data.synthetic(train=1, val=1, test=1)
    with pytest.raises(models.ModelError, match="'mobilenet' has no option preactivation"):
        models.for_task("mobilenet", task, preactivation=True)
    assert models.for_task("resnet8", task, preactivation=True).preactivation
