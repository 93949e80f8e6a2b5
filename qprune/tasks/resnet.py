"""CIFAR residual networks of depth 6n + 2 (He et al., 1512.03385, section 4.2; pre-activation form: 1603.05027)."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 32, 64)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    The shortcut is the identity, or shortcut_bn(shortcut(x)) with a 1x1 convolution where width or stride changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        self.shortcut_bn: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv1x1(inputs, outputs, stride)
            self.shortcut_bn = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.shortcut is not None and self.shortcut_bn is not None:
            x = self.shortcut_bn(self.shortcut(x))
        y: Tensor = self.relu2(out + x)
        return y


class PreActivationBlock(nn.Module):
    """conv2(relu(bn2(conv1(a)))) + shortcut, a = relu(bn1(x)).

    The shortcut is x itself, or a plain 1x1 convolution of a where width or stride changes (1603.05027: the activation is shared
    there), so every convolution of the block has a non-negative input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv1x1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(x))
        residual: Tensor = x if self.shortcut is None else self.shortcut(a)
        y: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(a))))
        return y + residual


class ResNet(nn.Module):
    """conv1, three stages of n blocks with 16, 32 and 64 filters (stride 2 into the second and third), average pool, fc.

    x [N, in_channels, H, W] -> logits [N, num_classes]. Any H, W >= 4. Convolutions have no bias.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, in_channels: int = 3, preactivation: bool = False) -> None:
        super().__init__()
        block = PreActivationBlock if preactivation else BasicBlock
        self.preactivation = preactivation
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        # Post-activation: behind conv1. Pre-activation: behind the last block, so the width differs.
        self.bn1 = nn.BatchNorm2d(WIDTHS[-1] if preactivation else WIDTHS[0])
        self.relu1 = nn.ReLU()
        width = WIDTHS[0]
        stages: list[nn.Module] = []
        for outputs in WIDTHS:
            blocks: list[nn.Module] = []
            for index in range(blocks_per_stage):
                blocks.append(block(width, outputs, stride=2 if stages and index == 0 else 1))
                width = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preactivation:
            x = self.relu1(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.preactivation:
            x = self.relu1(self.bn1(x))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def initialise(model: nn.Module) -> None:
    """Kaiming normal (1502.01852) for convolutions, fan-out so that the gradient's variance is kept; zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def resnet8(num_classes: int = 10, in_channels: int = 3, preactivation: bool = False) -> ResNet:
    """7 3x3 and 2 1x1 convolutions, 336 filters."""
    return ResNet(1, num_classes, in_channels, preactivation)


def thin_resnet(num_classes: int = 10, in_channels: int = 3, preactivation: bool = False) -> ResNet:
    """The geometry of `resnet8` under the name that Zur et al. (1904.09872) give it."""
    return ResNet(1, num_classes, in_channels, preactivation)


def resnet20(num_classes: int = 10, in_channels: int = 3, preactivation: bool = False) -> ResNet:
    """19 3x3 and 2 1x1 convolutions, 784 filters; 40,812,544 MACs in convolutions at 3x32x32."""
    return ResNet(3, num_classes, in_channels, preactivation)


def resnet56(num_classes: int = 10, in_channels: int = 3, preactivation: bool = False) -> ResNet:
    """55 3x3 and 2 1x1 convolutions; 125,747,200 MACs in convolutions at 3x32x32."""
    return ResNet(9, num_classes, in_channels, preactivation)
