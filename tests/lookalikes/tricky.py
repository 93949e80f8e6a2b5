"""What makes a channel of zeros differ from none, or hides who reads what: statistics over channels, hard-coded shapes, parts of
tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Middle = Callable[[], nn.Module]


class Around(nn.Module):
    """conv, the part in question on 8 channels, conv, head."""

    def __init__(self, middle: Middle, made: int = 8, read: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv = nn.Conv2d(6, made, 3, padding=1)
        self.middle = middle()
        self.last = nn.Conv2d(read, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(self.middle(self.conv(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU())


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.PReLU(8))


def tracked_instance_norm() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LeakyReLU(0.1))


def two_norms() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ELU())


def shifted() -> nn.Module:
    """Functions that make something of zero."""
    return nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid(), nn.Softplus())


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(nn.PixelShuffle(2), nn.ReLU())


class ChannelMean(nn.Module):
    """Attention over positions, from mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class NeighbourAttention(nn.Module):
    """A convolution over the channels' means, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(y)[:, :, None, None]


class Normalised(nn.Module):
    """Length 1 over the channels, which zeros do not change."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(F.relu(x), dim=1)


class SoftmaxOverChannels(nn.Module):
    """A zero has its share."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=1)


class Partial(nn.Module):
    """A convolution of the first channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [2, 6], dim=1)
        return F.relu(torch.cat((self.conv(first), rest), 1))


class Ghost(nn.Module):
    """Half of the channels are made of the other half; the sum of both is cut to size."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return torch.cat([x, self.cheap(x)], dim=1)[:, :14, :, :]


class Scales(nn.Module):
    """Splits that are convolved one after the other, each with the sum of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(3)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, 2, 1)
        made, y = [parts[0]], parts[0]
        for part, conv, bn in zip(parts[1:], self.convs, self.bns, strict=True):
            y = F.relu(bn(conv(y + part)))
            made.append(y)
        return torch.cat(made, 1)


class Multiplier(nn.Module):
    """A depthwise convolution with two filters per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(F.relu(x))))


class StandardisedConv(nn.Conv2d):
    """The weight is normalised in every call: a subclass that stays float."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = StandardisedConv(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(F.relu(x))))


class Modulated(nn.Module):
    """Scale and shift per channel, made by one linear layer of the image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.film = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.film(x.mean((2, 3))).chunk(2, dim=1)
        return F.relu(x * scale[:, :, None, None] + shift[:, :, None, None])


class HardCoded(nn.Module):
    """The number of features stands in the code, as `view` has it in many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 8, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.bn, self.fc2 = nn.Linear(8 * 5 * 5, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 8 * 5 * 5)
        return self.fc2(F.relu(self.bn(self.fc1(x))))


class Pyramid(nn.Module):
    """Lateral convolutions, sums from the top down, one shared head on every level, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)])
        self.lateral = nn.ModuleList([nn.Conv2d(c, 6, 1) for c in (5, 6, 8)])
        self.smooth = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)])
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = []
        for stage in self.stages:
            x = F.relu(stage(x))
            levels.append(x)
        top = self.lateral[2](levels[2])
        tops = [top]
        for i in (1, 0):
            top = self.lateral[i](levels[i]) + F.interpolate(top, size=levels[i].shape[-2:], mode="nearest")
            tops.insert(0, top)
        return {f"p{i}": self.head(F.relu(conv(top))) for i, (conv, top) in enumerate(zip(self.smooth, tops, strict=True))}


class Recurrent(nn.Module):
    """Columns of a feature map are the steps of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 4, 1), nn.ReLU())
        self.gru = nn.GRU(16, 6, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x).permute(0, 3, 1, 2).flatten(2)
        return self.fc(self.gru(x)[0])
