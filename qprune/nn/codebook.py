"""Layers with pruned, shared weights: CodebookConv2d, CodebookLinear. What method `annc` makes.

    net = search.method.network()
    refresh = CodebookRefresh(net, len(loader))
    fit(net, loader, epochs=60, lr=1e-3, weight_decay=1e-4, progress=refresh.progress, on_epoch=refresh.on_epoch)

The fine-tuning of ANNC (Yang et al., CVPR 2020): mask and bits frozen, codebooks refreshed by 5 of Lloyd's iterations about 20 times per
epoch, and by 100 between epochs. Ours: quantized inputs, for which the paper has no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.codebooks import WIDTHS, Codebook, refine
from qprune.errors import InputError, SpaceError
from qprune.nn.mixing import check_input
from qprune.nn.spread import Narrow, narrow_plain
from qprune.nn.surgery import take_over
from qprune.quantizers import InputQuantizer
from qprune.space import FLOAT, PRUNED, check_bits

STEP_ITERATIONS, EPOCH_ITERATIONS, PER_EPOCH = 5, 100, 20


class CodebookLayer(Narrow):
    """Mixin of CodebookConv2d and CodebookLinear: every weight in the mask has the nearest of 2^w_bits shared values, the others are 0.

    weight    the latent weight, a parameter; 0 outside of the mask, where it gets no gradient
    mask      bool, like weight; a buffer
    codebook  [2^w_bits] floating point, ascending; a buffer
    w_bits    1 … 8
    a_bits    of the input, quantized by PACT; 32: the input stays as it is
    linear    the shared values are equidistant, and refreshing them keeps them so
    """

    weight: Tensor
    mask: Tensor
    codebook: Tensor
    layer_name: str = ""

    def setup_codebook(self, mask: Tensor, values: Tensor, a_bits: int = FLOAT, linear: bool = False) -> None:
        """values: [2^bits], ascending. The latent weight becomes 0 outside of the mask."""
        bits = values.numel().bit_length() - 1
        if values.dim() != 1 or values.numel() != 2**bits or bits not in WIDTHS:
            raise SpaceError(f"codebook: expected a vector of 2^b values with b in 1 … 8, got shape {tuple(values.shape)}")
        if mask.shape != self.weight.shape:
            raise InputError(f"mask: expected the weight's shape {tuple(self.weight.shape)}, got {tuple(mask.shape)}")
        (self.a_bits,) = check_bits("a_bits", (a_bits,))
        if a_bits == PRUNED:
            raise SpaceError("a_bits: 0 bits of the input would leave nothing of the layer; expected 1 … 8, or 32")
        self.w_bits, self.linear = bits, linear
        self.surround(None, None)
        # memory of its own: the mask of whole filters may be expanded, and nothing can be loaded into that
        self.register_buffer("mask", torch.empty_like(self.weight, dtype=torch.bool).copy_(mask))
        self.register_buffer("codebook", values.detach().to(self.weight.device, torch.float32).clone())
        self.input_quantizer = InputQuantizer("pact", (a_bits,), self.weight.device) if a_bits != FLOAT else None
        with torch.no_grad():
            self.weight.mul_(self.mask)

    def shared_weight(self) -> Tensor:
        """What the layer computes with, in the latent weight's dtype and memory format. The gradient goes straight through to the latent
        weight where the mask is set."""
        latent = self.weight.detach()
        shared = torch.empty_like(latent).copy_(self.codebook.float()[self.codes()] * self.mask)
        return shared + (self.weight - latent) * self.mask

    def codes(self) -> Tensor:
        """The number of the shared value of every weight, int64, like weight; it means nothing outside of the mask."""
        values = self.codebook.float()
        return torch.bucketize(self.weight.detach().float().contiguous(), (values[1:] + values[:-1]) / 2)

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return x
        return self.input_quantizer(x, torch.ones(1, device=x.device))  # type: ignore[no-any-return]

    @torch.no_grad()
    def refresh(self, iterations: int = STEP_ITERATIONS) -> None:
        """Move the codebook by some of Lloyd's iterations on the latent weights in the mask. Not for forward passes: it waits for the
        device. Raises InputError if a weight is not finite."""
        book = Codebook(self.w_bits, self.codebook.float(), zero=False, error=0.0, linear=self.linear)
        self.codebook.copy_(refine(self.weight[self.mask], book, iterations, self.layer_name or type(self).__name__).values)

    @property
    def settings(self) -> dict[str, Any]:
        """What `blank_codebook` makes a layer from that this layer's state_dict fits."""
        return {"w_bits": self.w_bits, "a_bits": self.a_bits, "linear": self.linear}

    def as_plain(self) -> nn.Module:
        """The torch layer that this one extends, with the latent weight."""

        def strip(layer: nn.Module) -> None:
            for name in ("mask", "codebook"):
                layer._buffers.pop(name)
            for name in ("input_quantizer", "gather", "spread"):
                layer._modules.pop(name, None)
            for name in ("input_quantizer", "gather", "spread", "w_bits", "a_bits", "linear", "layer_name"):
                layer.__dict__.pop(name, None)

        cls: type[nn.Conv2d] | type[nn.Linear] = nn.Conv2d if isinstance(self, nn.Conv2d) else nn.Linear
        return narrow_plain(take_over(cls, self, strip), self.gather, self.spread)

    def extra_repr(self) -> str:
        share = "equidistant" if self.linear else "shared"
        return f"{super().extra_repr()}, w_bits={self.w_bits} ({share}), a_bits={self.a_bits}"


class CodebookConv2d(CodebookLayer, nn.Conv2d):
    """nn.Conv2d with pruned, shared weights. Made by `to_codebook`."""

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, (3, 4), self.in_channels, -3)
        x = self.gathered(input if input.dim() == 4 else input.unsqueeze(0))
        y = self.spread_out(self._conv_forward(self.quantized_input(x), self.shared_weight(), self.bias))
        return y if input.dim() == 4 else y.squeeze(0)


class CodebookLinear(CodebookLayer, nn.Linear):
    """nn.Linear with pruned, shared weights. Made by `to_codebook`."""

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, tuple(range(1, 9)), self.in_features, -1)
        x = self.quantized_input(self.gathered(input.reshape(-1, self.in_features)))
        y = self.spread_out(F.linear(x, self.shared_weight(), self.bias))
        return y.reshape(*input.shape[:-1], self.out_features)


def to_codebook(
    layer: nn.Conv2d | nn.Linear, mask: Tensor, values: Tensor, a_bits: int = FLOAT, linear: bool = False
) -> CodebookConv2d | CodebookLinear:
    """The layer with mask and codebook, sharing the parameters of `layer`, whose weight becomes 0 outside of the mask.

    mask    bool, as the weight; values [2^bits] ascending, bits in 1 … 8; a_bits, linear as in CodebookLayer

    Raises SpaceError for other numbers of values or bits, InputError for another mask.
    """
    cls: type[CodebookConv2d] | type[CodebookLinear] = CodebookConv2d if isinstance(layer, nn.Conv2d) else CodebookLinear
    return take_over(cls, layer, lambda made: made.setup_codebook(mask, values, a_bits, linear))


def blank_codebook(layer: nn.Conv2d | nn.Linear, w_bits: int, a_bits: int, linear: bool) -> CodebookConv2d | CodebookLinear:
    """The layer with a full mask and a codebook of zeros, to be filled from a state_dict."""
    if w_bits not in WIDTHS:
        raise SpaceError(f"w_bits: expected 1 … 8, got {w_bits!r}")
    return to_codebook(layer, torch.ones_like(layer.weight, dtype=torch.bool), torch.zeros(2**w_bits), a_bits, linear)


def codebook_layers(model: nn.Module) -> Iterator[tuple[str, CodebookLayer]]:
    """The layers with codebooks, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, CodebookLayer):
            yield name, layer


def refresh_codebooks(model: nn.Module, iterations: int = STEP_ITERATIONS) -> None:
    """Move all codebooks by so many of Lloyd's iterations."""
    for _, layer in codebook_layers(model):
        layer.refresh(iterations)


class CodebookRefresh:
    """Keeps the codebooks near the latent weights while a network is fine-tuned by `qprune.tasks.train.fit`: its `progress` and `on_epoch`
    are fit's arguments of the same names.

    steps_per_epoch  batches in one pass; codebooks are refreshed after every steps_per_epoch / per_epoch of them
    """

    def __init__(self, model: nn.Module, steps_per_epoch: int, per_epoch: int = PER_EPOCH) -> None:
        if steps_per_epoch < 1 or per_epoch < 1:
            raise InputError(f"CodebookRefresh: expected numbers from 1, got steps_per_epoch={steps_per_epoch}, per_epoch={per_epoch}")
        self.model, self.every = model, max(1, round(steps_per_epoch / per_epoch))

    def progress(self, step: int, total: int, loss: float) -> None:
        if step % self.every == 0:
            refresh_codebooks(self.model, STEP_ITERATIONS)

    def on_epoch(self, *record: Any) -> None:
        refresh_codebooks(self.model, EPOCH_ITERATIONS)
