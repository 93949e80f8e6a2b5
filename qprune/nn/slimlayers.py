"""Layers whose first filters are active and the rest not: a convolution, the normalisation behind it, a linear layer, a residual block.

Zur et al. (1904.09872), the pruning search; separate normalisation per width is of slimmable networks (Yu et al., 1812.08928). How many
input channels are active a layer reads off its input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import UnsupportedLayerError
from qprune.nn.surgery import take_over

SHORTCUTS = ("permanent", "temporary")


class SlimConv2d(nn.Conv2d):
    """A convolution of which the first `width` filters exist, over the first input channels that its input has.

    width  1 … out_channels
    order  [out_channels] int64, the index that each filter had in the network it came from
    """

    width: int
    order: Tensor

    @classmethod
    def from_float(cls, conv: nn.Conv2d, order: Tensor | None = None) -> SlimConv2d:
        """With the weights of `conv`, all active. order: what to remember; the weights are not moved."""

        def setup(layer: SlimConv2d) -> None:
            layer.width = layer.out_channels
            index = torch.arange(layer.out_channels) if order is None else order
            layer.register_buffer("order", index.to(layer.weight.device))

        return take_over(cls, conv, setup)

    def active(self, channels: int) -> tuple[Tensor, Tensor | None]:
        """(weight [width, channels, k, k], bias [width])."""
        return self.weight[: self.width, :channels], None if self.bias is None else self.bias[: self.width]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.active(x.size(1)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"


class SlimLinear(nn.Linear):
    """A linear layer over the first input features that its input has; its outputs are all there."""

    @classmethod
    def from_float(cls, linear: nn.Linear) -> SlimLinear:
        return take_over(cls, linear, lambda layer: None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : x.size(-1)], self.bias)


class SlimBatchNorm2d(nn.BatchNorm2d):
    """Normalisation of the first channels.

    Every homogeneous width has a normalisation of its own, norms[ratio]. Any other configuration shares one scale and shift (ours: the
    original makes fresh ones for every configuration and trains it from the start), and normalises by the statistics of the batch, in
    eval mode too, until they are estimated: while `batches` is a number, training mode averages them over batches, all with equal weight.

    ratio      index of the homogeneous width in use, None for another configuration
    estimated  the running statistics are those of the present configuration
    """

    norms: nn.ModuleList
    ratio: int | None
    estimated: bool
    batches: int | None

    @classmethod
    def from_float(cls, norm: nn.BatchNorm2d, widths: Sequence[int] = ()) -> SlimBatchNorm2d:
        """widths: the homogeneous ones, in the order of their ratios; each starts from the first channels of `norm`."""

        def setup(layer: SlimBatchNorm2d) -> None:
            layer.norms = nn.ModuleList(sliced_norm(norm, width) for width in widths)
            layer.ratio, layer.estimated, layer.batches = None, True, None

        return take_over(cls, norm, setup)

    def forward(self, x: Tensor) -> Tensor:
        if self.ratio is not None:
            y: Tensor = self.norms[self.ratio](x)
            return y
        channels = x.size(1)
        weight, bias = self.weight[:channels], self.bias[:channels]
        mean, variance = (None if s is None else s[:channels] for s in (self.running_mean, self.running_var))
        if self.training and self.batches is not None:
            self.batches += 1
            return F.batch_norm(x, mean, variance, weight, bias, True, 1 / self.batches, self.eps)
        if self.training or not self.estimated:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    def plain(self, channels: int) -> nn.BatchNorm2d:
        """The normalisation in use as an ordinary one; with fresh statistics (mean 0, variance 1) where none are estimated."""
        norm = copy.deepcopy(self.norms[self.ratio]) if self.ratio is not None else sliced_norm(self, channels)
        assert isinstance(norm, nn.BatchNorm2d)
        if self.ratio is None and not self.estimated:
            norm.reset_running_stats()
        return norm.train(self.training)


@torch.no_grad()
def sliced_norm(norm: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    """An ordinary normalisation with a copy of the first channels' parameters and statistics."""
    new = nn.BatchNorm2d(channels, norm.eps, norm.momentum, device=norm.weight.device, dtype=norm.weight.dtype)
    for name, value in new.state_dict().items():
        source = norm.state_dict()[name]
        value.copy_(source[:channels] if source.dim() else source)
    new.weight.requires_grad_(norm.weight.requires_grad)
    new.bias.requires_grad_(norm.bias.requires_grad)
    return new.train(norm.training)


class ResidualBlock(nn.Module):
    """relu2(bn2(conv2(relu1(bn1(conv1(x))))) + shortcut), the shortcut being x, or shortcut_bn(shortcut(x))."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    shortcut: nn.Module | None
    shortcut_bn: nn.Module | None

    def __init__(
        self,
        first: tuple[nn.Conv2d, nn.Module, nn.Module],
        second: tuple[nn.Conv2d, nn.Module, nn.Module],
        shortcut: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = first
        self.conv2, self.bn2, self.relu2 = second
        self.shortcut = None if shortcut is None else shortcut[0]
        self.shortcut_bn = None if shortcut is None else shortcut[1]

    @classmethod
    def of(cls, block: nn.Module) -> ResidualBlock | None:
        """The same block built of the same layers, for one with conv1, bn1, conv2, bn2, a rectifier (relu, or relu1 and relu2) and a
        shortcut (shortcut and shortcut_bn, or downsample = convolution and normalisation); None for anything else. That it computes the
        same is for the caller to check."""
        layers = dict(block.named_children())
        needed = {"conv1": nn.Conv2d, "bn1": nn.BatchNorm2d, "conv2": nn.Conv2d, "bn2": nn.BatchNorm2d}
        if not all(isinstance(layers.get(name), kind) for name, kind in needed.items()):
            return None
        rectifiers = [layers.pop(name, None) for name in ("relu1", "relu2")]
        if rectifiers == [None, None] and "relu" in layers:
            rectifiers = [layers["relu"], copy.deepcopy(layers["relu"])]
        layers.pop("relu", None)
        if None in rectifiers:
            return None
        pair = [layers.pop("shortcut", None), layers.pop("shortcut_bn", None)]
        downsample = layers.pop("downsample", None)
        if isinstance(downsample, nn.Sequential):
            pair = list(downsample)
        own = len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d)
        if len(layers) > len(needed) or (any(part is not None for part in pair) and not own):
            return None
        first, second = ((layers[f"conv{i}"], layers[f"bn{i}"], rectifiers[i - 1]) for i in (1, 2))
        built = cls(first, second, (pair[0], pair[1]) if own else None)  # type: ignore[arg-type]
        return built.train(block.training)

    def residual(self, x: Tensor, width: int) -> Tensor:
        if self.shortcut is None or self.shortcut_bn is None:
            return x
        y: Tensor = self.shortcut_bn(self.shortcut(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        y: Tensor = self.relu2(out + self.residual(x, out.size(1)))
        return y


class SlimBlock(ResidualBlock):
    """A residual block of slim layers. The network's own shortcut is as wide as conv2; without one, the shortcut is the identity if block
    input and conv2 have one width, and else `bridge`, a 1x1 convolution and its normalisation, of conv2's width.

    kind  "permanent": the bridge exists from the start and is trained in every configuration that needs it, sliced
          "temporary": `connect` makes a fresh one for the configuration, as the original does, where a configuration is then trained alone

    Either starts as the identity, cut or padded with zeros (ours; the original draws it).
    """

    bridge: nn.Conv2d | None
    bridge_bn: SlimBatchNorm2d | None

    def __init__(self, block: ResidualBlock, kind: str = "permanent") -> None:
        shortcut = (block.shortcut, block.shortcut_bn)
        super().__init__(
            (block.conv1, block.bn1, block.relu1),
            (block.conv2, block.bn2, block.relu2),
            shortcut if shortcut[0] is not None else None,  # type: ignore[arg-type]
        )
        self.kind, self.bridge, self.bridge_bn = kind, None, None
        self.train(block.training)
        if kind == "permanent" and self.shortcut is None:
            conv, self.bridge_bn = self._bridge(block.conv1.in_channels, block.conv2.out_channels)
            self.bridge = SlimConv2d.from_float(conv)

    def connect(self, channels: int) -> None:
        """Make the shortcut fit conv2's width and a block input of so many channels."""
        assert isinstance(self.conv2, SlimConv2d)
        width = self.conv2.width
        for conv in (self.shortcut, self.bridge):
            if isinstance(conv, SlimConv2d):
                conv.width = width
        if self.kind == "temporary" and self.shortcut is None:
            self.bridge, self.bridge_bn = self._bridge(channels, width) if channels != width else (None, None)

    def bridged(self, channels: int) -> bool:
        assert isinstance(self.conv2, SlimConv2d)
        return self.shortcut is None and channels != self.conv2.width

    def _bridge(self, channels: int, width: int) -> tuple[nn.Conv2d, SlimBatchNorm2d]:
        like = self.conv2.weight
        conv = nn.Conv2d(channels, width, 1, bias=False, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            conv.weight.copy_(torch.eye(width, channels)[:, :, None, None])
        norm = SlimBatchNorm2d.from_float(nn.BatchNorm2d(width, device=like.device, dtype=like.dtype))
        norm.estimated = False
        return conv.train(self.training), norm.train(self.training)

    def residual(self, x: Tensor, width: int) -> Tensor:
        if self.shortcut is not None or x.size(1) == width:
            return super().residual(x, width)
        assert self.bridge is not None and self.bridge_bn is not None
        y: Tensor = self.bridge_bn(self.bridge(x))
        return y


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise UnsupportedLayerError for a layer that cannot be made slim."""
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.Linear):
        if type(layer) not in (nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear):
            raise UnsupportedLayerError(f"layer {name}: {kind} cannot be made slim; only nn.Conv2d, nn.BatchNorm2d and nn.Linear can")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise UnsupportedLayerError(
                f"layer {name}: a convolution in {layer.groups} groups cannot be made slim: its inputs and filters are tied group by group"
            )
        if isinstance(layer, nn.BatchNorm2d) and not (layer.affine and layer.track_running_stats):
            raise UnsupportedLayerError(f"layer {name}: a normalisation without scale and shift or statistics cannot be made slim")
