"""What a weight quantizer does while a network is quantized gradually, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qprune.errors import QPruneError
from qprune.kernels import mix_quantize
from qprune.quantizers.base import Quantizer


class Staged(nn.Module):
    """A quantizer whose training mode goes through stages.

    stage  what training mode uses, one of `stages`. Eval mode quantizes always. Not part of state_dict: who sets it sets it again. Raises
           QPruneError for another value
    """

    stages: tuple[str, ...] = ("quantized",)
    _stage = "quantized"

    @property
    def stage(self) -> str:
        return self._stage

    @stage.setter
    def stage(self, value: str) -> None:
        if value not in self.stages:
            raise QPruneError(f"stage: {type(self).__name__} knows {', '.join(self.stages)}, got {value!r}")
        self._stage = value


class StagedQuantizer(Staged, Quantizer):
    """A quantizer of weights with stages (1804.10969, section 3; 1810.00162, section 3).

    stage  "quantized", "noisy" (noise of the size of a step, in place of rounding) or "float" (the weight as it is)
    seed   int64 [1], buffer: every draw of a forward pass is a function of it and of the position in the weight, whatever the device
    kept   bool, broadcasts with the weight, or None: entries that belong to the layer. The others are zero, and no statistic counts them.
           Not part of state_dict
    """

    stages = ("quantized", "noisy", "float")
    seed: Tensor
    kept: Tensor | None

    def _add_seed(self, device: torch.device | None) -> None:
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    def _add_kept(self) -> None:
        self.register_buffer("kept", None, persistent=False)

    @property
    def active_stage(self) -> str:
        """`stage` in training mode, "quantized" in eval mode."""
        return self._stage if self.training else "quantized"

    def renew(self, generator: torch.Generator) -> None:
        """A new seed, once per step, outside the forward pass. With the same generator state, every rank draws the same."""
        self.seed.copy_(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))


@torch.no_grad()
def uniform(seed: Tensor, like: Tensor) -> Tensor:
    """U[0, 1) for every element of `like`, float32, as a function of the seed [1]: the noise of one fused candidate around 1/2."""
    one = torch.ones(1, 1, device=like.device)
    with torch.autocast(like.device.type, enabled=False):
        middle = torch.full_like(like, 0.5, dtype=torch.float32)
        return mix_quantize(middle, torch.zeros_like(one), one, one, [1.0], [0.0], 0, [0], [0], seed)
