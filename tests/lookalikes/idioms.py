"""What networks of timm and of everyday code do besides: norms with the activation inside, blur pooling, split attention, shared modules,
decoders, control flow, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """A normalisation that drops and activates too."""

    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum or 0.0, self.eps)
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 1, groups: int = 1, apply_act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = BatchNormAct2d(width, apply_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class BlurPool2d(nn.Module):
    """A fixed depthwise kernel from a buffer: a convolution that is no layer."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.channels = channels
        self.register_buffer("kernel", torch.outer(row, row)[None, None].repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel.to(x), stride=2, groups=self.channels)


class AnyBlurPool2d(nn.Module):
    """As BlurPool2d, with one kernel for as many channels as come."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(row, row), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.to(x)[None, None].expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), weight, stride=2, groups=x.shape[1])


class SelectAdaptivePool2d(nn.Module):
    """Average and maximum of the whole image, concatenated, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1))


class AntiAliased(nn.Module):
    """Norms with activations inside, blur pooling, both poolings concatenated, and a classifier that may be taken away."""

    def __init__(self, blur: type[nn.Module] = BlurPool2d) -> None:
        super().__init__()
        self.conv_stem = ConvNormAct(3, 6)
        self.blocks = nn.Sequential(
            nn.ModuleDict({"conv": ConvNormAct(6, 8), "blur": blur(8) if blur is BlurPool2d else blur()}),
            nn.ModuleDict({"conv": ConvNormAct(8, 8, apply_act=False)}),
        )
        self.global_pool = SelectAdaptivePool2d()
        self.fc = nn.Linear(16, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv_stem(x)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            for layer in block.values():
                x = layer(x)
        return F.relu(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SplitAttention(nn.Module):
    """Two splits of one grouped convolution's output, weighted by a softmax over the splits and added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv = nn.Conv2d(6, 12, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(12)
        self.fc1 = nn.Conv2d(6, 4, 1)
        self.fc2 = nn.Conv2d(4, 12, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.conv(self.stem(x))))
        n, channels, height, width = x.shape
        x = x.reshape((n, 2, channels // 2, height, width))
        gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        attention = self.fc2(torch.relu(self.fc1(gap))).view(n, 2, channels // 2).softmax(1)
        out = (x * attention.reshape((n, 2, channels // 2, 1, 1))).sum(dim=1)
        return self.head(out.mean((2, 3)))


class Shared(nn.Module):
    """One convolution is called twice, with a norm of its own each time, and one module is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.body = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.first = nn.Sequential(self.body, self.norms[0])
        self.down = nn.Conv2d(6, 8, 3, 2, 1)
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        x = F.relu(self.first(x))
        x = F.relu(self.norms[1](self.body(x)))
        x = F.relu(self.down(x)).mean((2, 3))
        return self.heads[0](x), self.heads[1](x)


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, skip connections by concatenation; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self._double(3, 5)
        self.down2 = self._double(5, 6)
        self.middle = self._double(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 6, kernel_size=2, stride=2)
        self.merge2 = self._double(12, 6)
        self.merge1 = self._double(11, 5)
        self.out = nn.Conv2d(5, 2, 1)

    @staticmethod
    def _double(channels: int, width: int) -> nn.Sequential:
        first = (nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        return nn.Sequential(*first, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.middle(F.max_pool2d(two, 2)))
        x = self.merge2(torch.cat([x, two], dim=1))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.out(self.merge1(torch.cat([x, one], dim=1)))


class Branching(nn.Module):
    """How often a block runs depends on the data, and a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.narrow = nn.Conv2d(6, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.bn(self.stem(x)))
        for _ in range(3):
            if x.detach().abs().mean() > 1e-3:
                x = F.relu(self.block(x)) + x
        x = F.relu(self.narrow(x))
        return {"out": self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)), "features": x}


class PatchAttention(nn.Module):
    """A patch embedding that feeds attention: its channels become heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.patch_embed = nn.Conv2d(6, 8, kernel_size=4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 8) * 0.2)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(self.stem(x)).flatten(2).transpose(1, 2) + self.pos_embed
        n, tokens, channels = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, 2, channels // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, channels)
        x = x + self.proj(attended)
        x = x + self.mlp(x)
        return self.head(x.mean(1))
