"""The ImageNet networks whose layers and training steps are measured: ResNet-18, ResNet-50 (1512.03385) and MobileNetV2 (1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn

from qprune.tasks.resnet import initialise


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is a 1x1 convolution where width or stride changes."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


class Classifier(nn.Sequential):
    """Features, average pool, one linear layer: x [N, 3, H, W] → logits [N, num_classes]."""

    def __init__(self, features: list[nn.Module], width: int, num_classes: int) -> None:
        super().__init__(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        initialise(self)


def _resnet(blocks: tuple[int, ...], bottleneck: bool, num_classes: int) -> Classifier:
    features: list[nn.Module] = [conv_bn(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, count in enumerate(blocks):
        inner = 64 << stage
        outputs = inner * 4 if bottleneck else inner
        for block in range(count):
            stride = 2 if stage and block == 0 else 1
            if bottleneck:
                body = [
                    *conv_bn(width, inner, 1, activation=nn.ReLU),
                    *conv_bn(inner, inner, 3, stride, activation=nn.ReLU),
                    *conv_bn(inner, outputs, 1),
                ]
            else:
                body = [*conv_bn(width, inner, 3, stride, activation=nn.ReLU), *conv_bn(inner, outputs, 3)]
            features.append(Residual(nn.Sequential(*body), width, outputs, stride))
            width = outputs
    return Classifier(features, width, num_classes)


def resnet18(num_classes: int = 1000) -> Classifier:
    """20 convolutions and a linear layer, 11.7 million weights."""
    return _resnet((2, 2, 2, 2), False, num_classes)


def resnet50(num_classes: int = 1000) -> Classifier:
    """53 convolutions and a linear layer, 25.5 million weights; the stride of a stage is in its 3x3 convolution."""
    return _resnet((3, 4, 6, 3), True, num_classes)


class InvertedResidual(nn.Module):
    """expand (1x1), depthwise (3x3), project (1x1, no activation), plus x where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_bn(inputs, hidden, 1, activation=nn.ReLU6)] if expansion > 1 else []
        self.body = nn.Sequential(*expand, *conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6), *conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y + x if self.residual else y


def mobilenetv2(num_classes: int = 1000) -> Classifier:
    """52 convolutions, 17 of them depthwise, and a linear layer, 3.5 million weights."""
    features: list[nn.Module] = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
    width = 32
    for expansion, outputs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(count):
            features.append(InvertedResidual(width, outputs, stride if block == 0 else 1, expansion))
            width = outputs
    return Classifier([*features, conv_bn(width, 1280, 1, activation=nn.ReLU6)], 1280, num_classes)
