"""Small networks with the wiring, and the idioms in `forward`, of the convolutional networks that people bring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import branching, idioms, mobile, plain, residual, tricky

LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    "alexnet": plain.AlexNet,
    "vgg": partial(plain.VGG, norms=False),
    "vgg_bn": partial(plain.VGG, norms=True),
    "squeezenet": plain.SqueezeNet,
    "functional": plain.Functional,
    "resnet_basic": partial(residual.ResNet, residual.BasicBlock),
    "resnet_bottleneck": partial(residual.ResNet, residual.Bottleneck),
    "wide_resnet": partial(residual.ResNet, residual.Bottleneck, base=2),
    "resnext": partial(residual.ResNet, residual.Bottleneck, groups=2, base=1),
    "preactivation": residual.PreActivation,
    "regnet": residual.RegNet,
    "convnext": residual.ConvNeXt,
    "densenet": branching.DenseNet,
    "googlenet": branching.GoogLeNet,
    "inception_v3": branching.Inception3,
    "shufflenet": branching.ShuffleNet,
    "shufflenet_v2": branching.ShuffleNetV2,
    "mobilenet_v2": mobile.MobileNetV2,
    "mobilenet_v3": mobile.MobileNetV3,
    "mnasnet": mobile.MNASNet,
    "efficientnet": mobile.EfficientNet,
    "antialiased": idioms.AntiAliased,
    "antialiased_any_width": partial(idioms.AntiAliased, blur=idioms.AnyBlurPool2d),
    "split_attention": idioms.SplitAttention,
    "shared": idioms.Shared,
    "unet": idioms.UNet,
    "branching": idioms.Branching,
    "patch_attention": idioms.PatchAttention,
}
"""Name → a function that builds the network with random weights; all take [N, 3, 32, 32]."""

TRICKY: dict[str, Callable[[], nn.Module]] = {
    "group_norm": partial(tricky.Around, tricky.group_norm),
    "instance_norm": partial(tricky.Around, tricky.instance_norm),
    "tracked_instance_norm": partial(tricky.Around, tricky.tracked_instance_norm),
    "two_norms": partial(tricky.Around, tricky.two_norms),
    "shifted": partial(tricky.Around, tricky.shifted),
    "pixel_shuffle": partial(tricky.Around, tricky.pixel_shuffle, read=2),
    "channel_mean": partial(tricky.Around, tricky.ChannelMean),
    "neighbour_attention": partial(tricky.Around, tricky.NeighbourAttention),
    "normalised": partial(tricky.Around, tricky.Normalised),
    "softmax_over_channels": partial(tricky.Around, tricky.SoftmaxOverChannels),
    "partial": partial(tricky.Around, tricky.Partial),
    "ghost": partial(tricky.Around, tricky.Ghost, read=14),
    "scales": partial(tricky.Around, tricky.Scales),
    "multiplier": partial(tricky.Around, tricky.Multiplier, read=16),
    "standardised": partial(tricky.Around, tricky.Standardised),
    "modulated": partial(tricky.Around, tricky.Modulated),
    "hard_coded": tricky.HardCoded,
    "pyramid": tricky.Pyramid,
    "recurrent": tricky.Recurrent,
}
"""The same for networks of everyday code that are harder to prune."""

SHAPE = (2, 3, 32, 32)


@torch.no_grad()
def build(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode, with normalisations as training leaves them: no scale is 1, no shift 0, and some scales are negative."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = (LOOKALIKES | TRICKY)[name]()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.3, 1.0)
                signs = torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0)
                module.weight.uniform_(0.6, 1.4).mul_(signs)
                module.bias.normal_(0, 0.2)
    return net.eval()
