"""Chains: VGG, AlexNet, SqueezeNet, and a convolution as classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VGG(nn.Module):
    """Convolutions with biases, pooling to a fixed size, and a classifier whose first layer reads several features per channel."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (6, "pool", 8, "pool", 10, 10, "pool"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)] if norms else [nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 12), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(12, 12), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(12, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class AlexNet(nn.Module):
    """Overlapping pooling, and dropout before every linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(6, 8, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(54, 10), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class Fire(nn.Module):
    """One squeezing convolution that two expanding ones read, side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """The classifier is a convolution, averaged and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(6, 4, 5),
            Fire(10, 4, 6),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(12, 5, 6),
        )
        final = nn.Conv2d(12, 5, kernel_size=1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), final, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class Functional(nn.Module):
    """No activation and no pooling is a module; blocks in a ModuleList and a ModuleDict; convolutions without normalisation between."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, bias=False)])
        self.norms = nn.ModuleList([nn.Identity(), nn.BatchNorm2d(8)])
        self.ends = nn.ModuleDict({"reduce": nn.Conv2d(8, 6, 3, stride=2), "score": nn.Conv2d(6, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        x = F.leaky_relu(self.ends["reduce"](x), 0.1)
        return F.adaptive_avg_pool2d(self.ends["score"](x), 1).flatten(1)
