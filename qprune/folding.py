"""Folding normalisations into the layers before them, for deployment: the integer codes stay, their scales and the biases change."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qprune.codes import weight_codes
from qprune.errors import UnsupportedLayerError
from qprune.geometry import ExampleInputs, weighted_layers
from qprune.modes import kept_modes
from qprune.nn.codebook import CodebookLayer
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing
from qprune.nn.quant import QuantConv2d, QuantLinear
from qprune.nn.quantizing import Quantizing
from qprune.nn.spread import NarrowConv2d, NarrowLinear, Spread
from qprune.nn.surgery import copy_model, replace_modules
from qprune.normalised import Stays, normalised_layers
from qprune.quantizers import StoredWeightQuantizer, WeightQuantizer
from qprune.wrappers import unwrap

log = logging.getLogger("qprune")
_LEAST = 1e-30  # in place of a factor of 0, whose codes could not be read back; what it leaves is beneath any rounding
_PROBE = 64
_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(QuantConv2d, QuantLinear, NarrowConv2d, NarrowLinear),
)


def fold(model: nn.Module, example_inputs: ExampleInputs, norms: Collection[str] | None = None, negative_scales: bool = True) -> nn.Module:
    """A copy of a converted (or float) model without the normalisations that a convolution or linear layer can take over.

        γ (y − μ) / sqrt(σ² + ε) + β  =  m y + c,    weight ← m · weight,    bias ← m · bias + c

    example_inputs   for calls of the model, which show what every normalisation reads; a few samples are enough
    norms            names of those to fold: UnsupportedLayerError if one cannot be. None: all that can be; one log line says which stay
                     and why
    negative_scales  a filter with m < 0 keeps its integer codes, and its scale becomes negative. False, for runtimes that refuse such
                     scales: its codes change sign instead; where their grid has no room for that ("lsq" weights that use the lowest level
                     of two's complement) the normalisation stays

    Quantized weights have one scale per filter afterwards, whatever they had, and lie on their grids (see
    qprune.quantizers.StoredWeightQuantizer): codes and bits are bit for bit those from before, outputs in eval mode the same up to
    rounding. To train on, keep the model that was given.

    A normalisation is folded if it uses running statistics, reads exactly the output of one layer, both are called once, and nothing else
    depends on that output; for that the model is run with the output replaced by NaN. One that activates too (timm's BatchNormAct2d) is
    replaced by the modules that it holds, if they are all it does besides. Layers whose filters share levels (codebooks, "uniq") keep
    theirs. Raises UnsupportedLayerError for a model that is still being searched, InputError for one that returns no tensor.
    """
    final = copy_model(unwrap(model))
    modules = dict(final.named_modules())
    mixed = next((name for name, module in modules.items() if isinstance(module, Mixing | FilterConv2d)), None)
    if mixed is not None:
        raise UnsupportedLayerError(f"fold: layer {mixed!r} still has candidates; convert(model, policy) first")
    known = [name for name, module in modules.items() if isinstance(module, _BatchNorm)]
    for name in norms or ():
        if name not in known:
            raise UnsupportedLayerError(f"fold: {name!r} is no BatchNorm of this network; it has {', '.join(known) or 'none'}")
    wanted = known if norms is None else [name for name in known if name in norms]
    found, reasons = normalised_layers(final, example_inputs, wanted)
    for norm, layer in found.items():
        try:
            final = _fold_pair(final, layer, norm, negative_scales)
        except Stays as reason:
            reasons[norm] = str(reason)
    if reasons and norms is not None:
        name = next(iter(reasons))
        raise UnsupportedLayerError(f"fold: normalisation {name!r} cannot be folded: {reasons[name]}")
    if reasons:
        log.info("qprune: these normalisations stay: %s", "; ".join(f"{name} ({why})" for name, why in reasons.items()))
    return final


def folded(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Layer → what `refold` needs to know, of a folded model."""
    found = {name: layer.__dict__.get("qprune_folded") for name, layer in weighted_layers(unwrap(model))}
    return {name: settings for name, settings in found.items() if settings is not None}


def refold(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The structure of a folded model, made of one that is not, in place; its tensors still to be filled. Raises UnsupportedLayerError
    where they do not fit."""
    for layer, settings in layers.items():
        try:
            model = _fold_pair(model, layer, settings["norm"], constants=settings["constants"])
        except (Stays, KeyError, AttributeError) as error:
            raise UnsupportedLayerError(f"layer {layer!r} has no normalisation to fold here ({error})") from None
    return model


@torch.no_grad()
def _fold_pair(model: nn.Module, layer_name: str, norm_name: str, negative: bool = True, constants: bool | None = None) -> nn.Module:
    """constants: whether channels without a filter get a constant; None: if there is one that is not 0."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    behind = _behind(norm)
    spread = getattr(layer, "spread", None)
    assert isinstance(norm, _BatchNorm) and (spread is None or isinstance(spread, Spread))
    factor, shift = rows = _affine(norm)
    if spread is not None:
        row = _rows_of(spread, len(factor))
        rows = factor[row], shift[row]
    _scale_rows(layer, *rows, negative)
    if spread is not None:
        constant = _constants(spread, factor, shift)
        constants = bool(constant.any()) if constants is None else constants
        spread.bias = nn.Parameter(constant.to(norm.running_mean)) if constants else None
    layer.__dict__["qprune_folded"] = {"norm": norm_name, "constants": bool(constants)}
    return replace_modules(model, {norm: behind})


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(m, c) [C] float64."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * factor
    if norm.weight is not None:
        factor, shift = factor * norm.weight.double(), shift * norm.weight.double()
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def _behind(norm: nn.Module) -> nn.Module:
    """What a normalisation does besides normalising, as a module: an identity, or the modules that it holds."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise Stays("it has no running statistics")
    held = OrderedDict(norm.named_children())
    rest = nn.Sequential(held) if held else nn.Identity()
    if type(norm).__module__.startswith("torch.nn."):
        return rest
    width = norm.num_features
    sides = 0 if isinstance(norm, nn.BatchNorm1d) else 3 if isinstance(norm, nn.BatchNorm3d) else 2
    x = torch.randn(_PROBE, width, *[1] * sides, generator=torch.Generator().manual_seed(0)).to(norm.running_mean)
    factor, shift = (t.to(x).view(1, -1, *[1] * sides) for t in _affine(norm))
    try:
        with kept_modes(norm):
            norm.eval()
            same = torch.allclose(norm(x.clone()), rest(x * factor + shift), rtol=1e-4, atol=1e-5)
    except Exception as error:  # whatever code of somebody else raises
        raise Stays(f"{type(norm).__name__} could not be tried ({type(error).__name__}: {error})") from None
    if not same:
        raise Stays(f"{type(norm).__name__} does something besides normalising and calling the modules that it holds")
    return rest


def _rows_of(spread: Spread, width: int) -> Tensor:
    """The channel of every filter."""
    row = torch.argsort(spread.index, stable=True)[: spread.channels]
    if len(spread.index) != width or not torch.equal(spread.index[row], torch.arange(spread.channels, device=row.device)):
        raise Stays("the layer does not put every filter into one channel of the normalisation")
    if bool((spread.index < spread.channels).sum() != spread.channels):
        raise Stays("the layer puts filters into several channels of the normalisation")
    return row


def _constants(spread: Spread, factor: Tensor, shift: Tensor) -> Tensor:
    """What channels that no filter makes have behind the normalisation; 0 for the others."""
    before = torch.zeros_like(shift) if spread.bias is None else spread.bias.double()
    return torch.where(spread.index == spread.channels, factor * before + shift, 0.0)


def _scale_rows(layer: nn.Module, factor: Tensor, shift: Tensor, negative: bool) -> None:
    """weight ← factor · weight, bias ← factor · bias + shift, along the filters."""
    if isinstance(layer, CodebookLayer):
        raise Stays("its weights are shared by all filters, which therefore cannot be scaled one by one")
    if type(layer) not in _LAYERS or "weight" not in layer._parameters or "forward" in layer.__dict__:
        raise Stays("the layer has code of its own")
    assert isinstance(layer, _ConvNd | nn.Linear)
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    if layer.weight.size(axis) != len(factor):
        raise Stays(f"it has {len(factor)} channels, the layer {layer.weight.size(axis)} filters per group")
    weight = layer.weight
    if isinstance(layer, Quantizing):
        factor = torch.where(factor == 0, _LEAST, factor)
        weight = _fix_codes(layer, factor.to(weight.dtype), negative)
    else:
        weight = weight * factor.to(weight.dtype).view([-1 if i == axis else 1 for i in range(weight.dim())])
    bias = shift if layer.bias is None else layer.bias.double() * factor + shift
    layer.weight = nn.Parameter(weight.detach(), layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), layer.weight.requires_grad if layer.bias is None else layer.bias.requires_grad)


def _fix_codes(layer: Quantizing, factor: Tensor, negative: bool) -> Tensor:
    """The quantized weight times the factor; the layer gets the quantizer that leaves it so, and scales times the factor."""
    old = layer.weight_quantizer
    if not isinstance(old, WeightQuantizer):
        raise Stays(f"{old.kind!r} weights share their levels, which therefore cannot be scaled filter by filter")
    with kept_modes(old):
        weight = old.eval()(layer.weight, layer.one_hot) * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    codes = weight_codes(layer)
    column = (-1, *[1] * (weight.dim() - 1))
    if not negative:
        levels, highest = 2 * codes.zero_point.view(column) - codes.levels, codes.steps.view(column)
        outside = (factor < 0).view(column) & (highest > 0) & ((levels < 0) | (levels > highest))
        if bool(outside.any()):
            raise Stays("filters have negative factors and use the lowest level of two's complement")
    new = StoredWeightQuantizer(old.kind, old.bits, len(weight), weight.device).train(old.training)
    new.scale = codes.scale.to(factor.dtype) * (factor if negative else factor.abs())
    new.kept = old.kept
    layer.weight_quantizer = new
    if weight.dtype == torch.float32:
        # codes times the new scales bit for bit, as a packed file gives it back
        exact = replace(codes, scale=codes.scale * factor, floats=None).values()
        weight = torch.where((codes.steps > 0).view(column), exact, weight)
    return weight
