"""LeNet-5 as the compression literature means it (Caffe's 20-50-500 form of LeCun et al. 1998), 430,500 weights at 1x28x28."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import InputError
from .resnet import initialise


class LeNet5(nn.Module):
    """conv1 (20@5x5), pool, conv2 (50@5x5), pool, fc1 (500), ReLU, fc2: x [N, in_channels, S, S] -> [N, num_classes], S = image_size.

    The ReLUs behind the convolutions are later additions to Caffe's form, which has one behind fc1 only; quantised inputs of conv2 and
    fc1 are unsigned with them.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise InputError(f"lenet5 needs images of at least 16 pixels, got image_size={image_size}")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(f"lenet5 was built with image_size={self.image_size}, got an input of shape {tuple(x.shape)}")
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(x.flatten(1))))
        return logits


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> LeNet5:
    """2 convolutions with bias and 2 linear layers. image_size 28 is MNIST; the input size of fc1 follows from it."""
    return LeNet5(num_classes, in_channels, image_size)
