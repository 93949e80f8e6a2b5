"""Concatenations and shuffles: DenseNet, GoogLeNet, Inception-v3, ShuffleNet, ShuffleNetV2."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Reads the concatenation of everything before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return F.dropout(self.conv2(self.relu2(self.norm2(bottleneck))), 0.1, self.training)


class DenseBlock(nn.ModuleDict):
    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.features = nn.Sequential(OrderedDict([("conv0", stem), ("norm0", nn.BatchNorm2d(6)), ("relu0", nn.ReLU(True))]))
        self.features.add_module("denseblock1", DenseBlock(6, 3, 2))
        transition = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(True), nn.Conv2d(12, 6, 1, bias=False), nn.AvgPool2d(2, 2))
        self.features.add_module("transition1", transition)
        self.features.add_module("denseblock2", DenseBlock(6, 3, 2))
        self.features.add_module("norm5", nn.BatchNorm2d(12))
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class BasicConv2d(nn.Module):
    def __init__(self, channels: int, width: int, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, bias=False, **options)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class GoogLeNet(nn.Module):
    """Four branches per block; an auxiliary classifier that runs in training only; the input may be rescaled channel by channel."""

    class Inception(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.branch1 = BasicConv2d(channels, 4, kernel_size=1)
            self.branch2 = nn.Sequential(BasicConv2d(channels, 3, kernel_size=1), BasicConv2d(3, 4, kernel_size=3, padding=1))
            self.branch3 = nn.Sequential(BasicConv2d(channels, 3, kernel_size=1), BasicConv2d(3, 3, kernel_size=3, padding=1))
            self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(channels, 3, kernel_size=1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.transform_input = True
        self.conv1 = BasicConv2d(3, 6, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception3a = self.Inception(6)
        self.inception3b = self.Inception(14)
        self.aux1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 5))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.transform_input:
            rescaled = ((0.5, 0.1), (0.4, 0.0), (0.6, -0.1))
            channels = [torch.unsqueeze(x[:, c], 1) * scale + shift for c, (scale, shift) in enumerate(rescaled)]
            x = torch.cat(channels, 1)
        x = self.inception3a(self.maxpool1(self.conv1(x)))
        aux = self.aux1(x) if self.training else None
        x = self.avgpool(self.inception3b(x))
        x = self.fc(self.dropout(torch.flatten(x, 1)))
        return x if aux is None else (x, aux)


class Inception3(nn.Module):
    """Branches that fork again, asymmetric kernels, an average-pooled branch, and a pooled one without convolution."""

    class Mixed(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.branch1x1 = BasicConv2d(channels, 3, kernel_size=1)
            self.branch3x3_1 = BasicConv2d(channels, 4, kernel_size=1)
            self.branch3x3_2a = BasicConv2d(4, 3, kernel_size=(1, 3), padding=(0, 1))
            self.branch3x3_2b = BasicConv2d(4, 3, kernel_size=(3, 1), padding=(1, 0))
            self.branch7x7 = nn.Sequential(
                BasicConv2d(channels, 3, kernel_size=1),
                BasicConv2d(3, 4, kernel_size=(1, 7), padding=(0, 3)),
                BasicConv2d(4, 3, kernel_size=(7, 1), padding=(3, 0)),
            )
            self.branch_pool = BasicConv2d(channels, 3, kernel_size=1)

        def _forward(self, x: Tensor) -> list[Tensor]:
            inner = self.branch3x3_1(x)
            forked = torch.cat([self.branch3x3_2a(inner), self.branch3x3_2b(inner)], 1)
            pooled = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
            return [self.branch1x1(x), forked, self.branch7x7(x), pooled]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self._forward(x), 1)

    class Reduction(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.branch3x3 = BasicConv2d(channels, 4, kernel_size=3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 6, kernel_size=3, stride=2)
        self.Mixed_5b = self.Mixed(6)
        self.Mixed_6a = self.Reduction(15)
        self.Mixed_7c = self.Mixed(19)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Mixed_7c(self.Mixed_6a(self.Mixed_5b(self.Conv2d_1a_3x3(x))))
        return self.fc(torch.flatten(self.dropout(self.avgpool(x)), 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    n, channels, height, width = x.size()
    x = x.view(n, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(n, channels, height, width)


class ShuffleNetV2(nn.Module):
    """Half of the channels pass around a block; the halves are concatenated and shuffled."""

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            self.stride, half = stride, width // 2
            self.branch1 = nn.Sequential()
            if stride > 1:
                self.branch1 = nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                    nn.BatchNorm2d(channels),
                    *(nn.Conv2d(channels, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)),
                )
            self.branch2 = nn.Sequential(
                *(nn.Conv2d(channels if stride > 1 else half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)),
                *(nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half)),
                *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)),
            )

        def forward(self, x: Tensor) -> Tensor:
            if self.stride == 1:
                kept, worked = x.chunk(2, dim=1)
                out = torch.cat((kept, self.branch2(worked)), dim=1)
            else:
                out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
            return channel_shuffle(out, 2)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True))
        self.stage2 = nn.Sequential(self.Block(6, 8, 2), self.Block(8, 8, 1), self.Block(8, 8, 1))
        self.conv5 = nn.Sequential(nn.Conv2d(8, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(True))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.conv1(x)))
        return self.fc(x.mean([2, 3]))


class ShuffleNet(nn.Module):
    """Grouped 1×1 convolutions with a shuffle between them."""

    class Block(nn.Module):
        def __init__(self, width: int, groups: int) -> None:
            super().__init__()
            self.groups = groups
            self.conv1 = nn.Conv2d(width, width, 1, groups=groups, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, width, 1, groups=groups, bias=False)
            self.bn3 = nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
            out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
            return F.relu(out + x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, 2, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU(True))
        self.blocks = nn.Sequential(self.Block(9, 3), self.Block(9, 3))
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
