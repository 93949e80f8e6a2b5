"""Depthwise networks: MobileNetV2, MNASNet, MobileNetV3, EfficientNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .residual import SqueezeExcitation


class ConvNormActivation(nn.Sequential):
    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        conv = nn.Conv2d(channels, width, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width), *([] if act is None else [act(inplace=True)]))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project without an activation; the addition has none either."""

    def __init__(self, channels: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and channels == width
        hidden = channels * expand
        layers: list[nn.Module] = [] if expand == 1 else [ConvNormActivation(channels, hidden, 1, act=nn.ReLU6)]
        layers += [ConvNormActivation(hidden, hidden, stride=stride, groups=hidden, act=nn.ReLU6)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 6, stride=2, act=nn.ReLU6),
            InvertedResidual(6, 4, 1, 1),
            InvertedResidual(4, 6, 2, 2),
            InvertedResidual(6, 6, 1, 2),
            ConvNormActivation(6, 10, 1, act=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class MNASNet(nn.Module):
    """As MobileNetV2, with 5×5 kernels and norms of a small momentum; one flat Sequential."""

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
            super().__init__()
            hidden, norm = channels * 2, partial(nn.BatchNorm2d, momentum=0.0003)
            self.apply_residual = channels == width and stride == 1
            self.layers = nn.Sequential(
                *(nn.Conv2d(channels, hidden, 1, bias=False), norm(hidden), nn.ReLU(inplace=True)),
                *(nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False), norm(hidden), nn.ReLU(inplace=True)),
                *(nn.Conv2d(hidden, width, 1, bias=False), norm(width)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) + x if self.apply_residual else self.layers(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)),
            nn.Sequential(self.Block(4, 6, 5, 2), self.Block(6, 6, 5, 1)),
            *(nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(inplace=True)),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean([2, 3]))


class MobileNetV3(nn.Module):
    """Squeeze and excitation by a hard sigmoid, Hardswish, and a hidden linear layer in the classifier."""

    class Block(nn.Module):
        def __init__(self, channels: int, hidden: int, width: int, stride: int, excite: bool, activation: type[nn.Module]) -> None:
            super().__init__()
            self.use_res_connect = stride == 1 and channels == width
            layers: list[nn.Module] = [] if hidden == channels else [ConvNormActivation(channels, hidden, 1, act=activation)]
            layers.append(ConvNormActivation(hidden, hidden, 3, stride, hidden, activation))
            layers += [SqueezeExcitation(hidden, 3, scale=nn.Hardsigmoid)] if excite else []
            self.block = nn.Sequential(*layers, ConvNormActivation(hidden, width, 1, act=None))

        def forward(self, x: Tensor) -> Tensor:
            result = self.block(x)
            if self.use_res_connect:
                result += x
            return result

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 6, 3, 2, act=nn.Hardswish),
            self.Block(6, 6, 6, 1, True, nn.ReLU),
            self.Block(6, 12, 8, 2, False, nn.Hardswish),
            self.Block(8, 16, 8, 1, True, nn.Hardswish),
            ConvNormActivation(8, 12, 1, act=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(12, 10), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class StochasticDepth(nn.Module):
    """Drops a sample's residual branch in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.empty(x.size(0), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class EfficientNet(nn.Module):
    """SiLU everywhere, which passes a little of what is negative."""

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, kernel: int, stride: int, expand: int) -> None:
            super().__init__()
            self.use_res_connect = stride == 1 and channels == width
            hidden = channels * expand
            self.block = nn.Sequential(
                *([ConvNormActivation(channels, hidden, 1, act=nn.SiLU)] if expand > 1 else []),
                ConvNormActivation(hidden, hidden, kernel, stride, hidden, nn.SiLU),
                SqueezeExcitation(hidden, 2, partial(nn.SiLU, inplace=True)),
                ConvNormActivation(hidden, width, 1, act=None),
            )
            self.stochastic_depth = StochasticDepth(0.1)

        def forward(self, x: Tensor) -> Tensor:
            result = self.block(x)
            if self.use_res_connect:
                result = self.stochastic_depth(result)
                result += x
            return result

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 6, 3, 2, act=nn.SiLU),
            nn.Sequential(self.Block(6, 4, 3, 1, 1)),
            nn.Sequential(self.Block(4, 6, 5, 2, 3), self.Block(6, 6, 5, 1, 2)),
            ConvNormActivation(6, 10, 1, act=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
