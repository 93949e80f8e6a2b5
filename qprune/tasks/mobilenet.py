"""A small MobileNetV2 (Sandler et al., 1801.04381) for images of 16 to 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn

from .resnet import conv1x1, conv3x3, initialise

STEM = 16
HEAD = 128
# (expansion, filters, blocks, stride of the first block) per stage: two halvings, because the images are small
STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 2, 1))


class InvertedResidual(nn.Module):
    """expand (1x1) -> depthwise (3x3) -> project (1x1, no activation: the linear bottleneck), plus x where the shapes agree.

    With expansion 1 there is no expand layer, as in the original. The output is signed.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand: nn.Module = nn.Identity()
        self.bn1: nn.Module = nn.Identity()
        self.relu1: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand, self.bn1, self.relu1 = conv1x1(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU6()
        self.project = conv1x1(hidden, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.expand(x)))
        out = self.relu2(self.bn2(self.depthwise(out)))
        y: Tensor = self.bn3(self.project(out))
        return y + x if self.residual else y


class MobileNet(nn.Module):
    """conv1 (3x3), four stages of inverted residuals, conv2 (1x1), average pool, fc: x [N, in_channels, H, W] -> [N, num_classes]."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu1 = nn.ReLU6()
        width = STEM
        stages: list[nn.Module] = []
        for expansion, outputs, count, stride in STAGES:
            blocks: list[nn.Module] = []
            for index in range(count):
                blocks.append(InvertedResidual(width, outputs, stride if index == 0 else 1, expansion))
                width = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.conv2 = conv1x1(width, HEAD)
        self.bn2 = nn.BatchNorm2d(HEAD)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEAD, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def mobilenet(num_classes: int = 10, in_channels: int = 3) -> MobileNet:
    """7 inverted residuals, 22 convolutions of which 7 are depthwise."""
    return MobileNet(num_classes, in_channels)
