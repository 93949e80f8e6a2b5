"""Residual networks: ResNet, ResNeXt, wide, pre-activation, RegNet with squeeze and excitation, ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """One ReLU module for both places."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1, groups: int = 1, base: float = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn1(self.conv1(x))
        out = self.relu(out)
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1×1, 3×3 (grouped in ResNeXt, wider in wide networks), 1×1."""

    expansion = 2

    def __init__(self, channels: int, width: int, stride: int = 1, groups: int = 1, base: float = 1) -> None:
        super().__init__()
        inner = int(width * base)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def _downsample(channels: int, out: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], groups: int = 1, base: float = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = 6
        for number, (width, stride) in enumerate(((6, 1), (8, 2)), 1):
            blocks = [block(channels, width, stride, groups, base)]
            channels = width * block.expansion
            blocks.append(block(channels, width, 1, groups, base))
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """Normalisation and rectifier come before the convolution; the first block's shortcut reads the activated input."""

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

        def forward(self, x: Tensor) -> Tensor:
            active = torch.relu(self.bn1(x))
            shortcut = x if self.shortcut is None else self.shortcut(active)
            return self.conv2(torch.relu(self.bn2(self.conv1(active)))) + shortcut

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(self.Block(6, 6, 1), self.Block(6, 8, 2), self.Block(8, 8, 1))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """Every channel is scaled by a number made from the means of all."""

    def __init__(
        self, channels: int, squeezed: int, activation: Callable[[], nn.Module] = nn.ReLU, scale: Callable[[], nn.Module] = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class RegNet(nn.Module):
    """A grouped convolution, with squeeze and excitation behind it, in every block."""

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            self.proj = _downsample(channels, width, stride)
            self.f = nn.Sequential()
            self.f.add_module("a", nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)))
            grouped = nn.Conv2d(width, width, 3, stride, 1, groups=width // 4, bias=False)
            self.f.add_module("b", nn.Sequential(grouped, nn.BatchNorm2d(width), nn.ReLU(True)))
            self.f.add_module("se", SqueezeExcitation(width, 3))
            self.f.add_module("c", nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)))
            self.activation = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            x = (x if self.proj is None else self.proj(x)) + y
            return self.activation(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.trunk_output = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 12, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.trunk_output(self.stem(x)))
        return self.fc(x.flatten(start_dim=1))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.order)


class ConvNeXt(nn.Module):
    """A depthwise 7×7, then linear layers on channels-last activations, and a learned scale per channel before the addition."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.block = nn.Sequential(
                nn.Conv2d(width, width, 7, padding=3, groups=width, bias=True),
                Permute((0, 2, 3, 1)),
                nn.LayerNorm(width, eps=1e-6),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width),
                Permute((0, 3, 1, 2)),
            )
            self.layer_scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer_scale * self.block(x) + x

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6)),
            self.Block(6),
            nn.Sequential(LayerNorm2d(6), nn.Conv2d(6, 8, 2, 2)),
            self.Block(8),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(8), nn.Flatten(1), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))
