"""Whether a converted network is one of integers: `verify` runs it on codes with int32 accumulators and compares.

Two runs per batch. In the second, every layer that has integer codes for its weight and its input is computed in whole numbers
(`qprune.integer_reference`) and hands that output on; beside it, the layer itself computes on the same input. Both must agree but for the
rounding of the final factor. So the whole network differs from the fake-quantized one only by such roundings, and by codes that they carry
over the boundary between two levels, which are counted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.codes import input_codes, output_codes, weight_codes
from qprune.errors import InputError, UnsupportedLayerError, VerificationError
from qprune.geometry import ExampleInputs, Unit, first_input, run, weighted_layers
from qprune.integer_reference import INT32, InputGrid, IntegerLayer, Site, activation_site, apply, signed_bits, to_middle
from qprune.modes import kept_modes
from qprune.nn import integer
from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import CodebookLayer
from qprune.nn.mixing import Mixing
from qprune.nn.quant import QuantConv2d, QuantLinear
from qprune.recalibrate import only_inputs
from qprune.record import record_of
from qprune.space import FLOAT, PRUNED
from qprune.verification import TIE_STEPS, LayerCheck, Verification
from qprune.wrappers import unwrap

ROUNDINGS = 12
"""Float32 roundings between codes and output, sums apart: of scales, of the input's and weight's values, of the result."""
EPSILON = 2.0**-24
TIE_ULPS = 8.0
"""How far, in units in the last place, a value may lie from the middle between two levels where dividing by the scale and multiplying by
its inverse round it to different ones."""


def verify(model: nn.Module, loader: Iterable[Any], batches: int | None = 4, strict: bool = False) -> Verification:
    """Run a converted network on integer codes with int32 accumulators, and compare it to itself.

    loader   batches of inputs as for `prepare`, or (x, y) pairs of which x is used
    batches  at most so many of them (None: all)
    strict   raise VerificationError where the result is not `ok`

    The model, in float32, is run in eval mode where it is; nothing of it changes. Raises InputError if there is no batch, or for another
    dtype, and UnsupportedLayerError for a model that is still being searched.
    """
    inner = unwrap(model)
    mixed = next((name for name, layer in weighted_layers(inner) if isinstance(layer, Mixing)), None)
    if mixed is not None:
        raise UnsupportedLayerError(f"verify: layer {mixed!r} still has candidates; convert(model, policy) first")
    other = next((p.dtype for p in inner.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise InputError(f"verify: the model has parameters of {other}, expected float32; call model.float()")
    device = next((p.device.type for p in inner.parameters()), "cpu")
    with kept_modes(inner), torch.no_grad(), torch.autocast(device, enabled=False), integer.enabled(False):
        check = _Check(inner.eval(), record_of(model))
        for batch in itertools.islice(loader, batches):
            check.batch(only_inputs(batch))
        found = check.result()
    if strict and not found.ok:
        raise VerificationError(f"integers do not reproduce the network: {found.problem}", found)
    return found


@dataclass
class _Layer:
    """A layer while it is checked."""

    row: LayerCheck
    integer: IntegerLayer | None = None
    site: Site | None = None
    produced: bool = False
    low: int = 0
    high: int = 0


@dataclass
class _Check:
    model: nn.Module
    record: Any
    layers: dict[str, _Layer] = field(init=False)
    samples: int = 0
    same: int = 0
    ranked: int = 0
    difference: float = 0.0
    changed: int = 0
    boundary: float = 0.0

    def __post_init__(self) -> None:
        geometry = None if self.record is None else self.record.geometry
        self.units: Mapping[str, Unit] = {} if geometry is None else geometry.units
        self.modules = dict(self.model.named_modules())
        self.layers = {name: self._prepare(name, layer) for name, layer in weighted_layers(self.model)}
        self.activations = {n: site for n, m in self.modules.items() if isinstance(m, QuantActivation) and (site := activation_site(m))}
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def _prepare(self, name: str, layer: nn.Module) -> _Layer:
        if isinstance(layer, CodebookLayer):
            row = LayerCheck(
                name, type(layer).__name__, (layer.w_bits,), layer.a_bits, "float", "its shared values are no multiples of a step"
            )
            return _Layer(row)
        if not isinstance(layer, QuantConv2d | QuantLinear):
            return _Layer(LayerCheck(name, type(layer).__name__, (FLOAT,), FLOAT, "float", "not quantized"))
        row = LayerCheck(name, type(layer).__name__, tuple(sorted(set(layer.w_bits))), layer.a_bits, "float")
        if not set(layer.w_bits) - {PRUNED, FLOAT}:
            return _Layer(
                replace(row, reason="all its filters are at 32 bits" if FLOAT in layer.w_bits else "all its filters are at 0 bits")
            )
        if layer.a_bits == PRUNED:
            return _Layer(replace(row, reason="its input is at 0 bits"))
        try:
            grid, produced = self._grid(name, layer)
            weight = weight_codes(layer)
        except UnsupportedLayerError as error:
            return _Layer(replace(row, reason=str(error).partition(": ")[2]))
        made = IntegerLayer(layer, weight, grid)
        some = f"{int(made.float.sum())} filters at 32 bits stay float" if made.float.any() else ""
        if made.bound.bits > INT32:
            row = replace(row, status="failed", reason=f"its accumulator may need {made.bound.bits} bits")
        else:
            row = replace(row, status="integer", reason=some)
        # a grid of doubled codes has the levels of the quantizer all the same
        site = Site(grid.scale * grid.doubled, (grid.high - grid.low) // grid.doubled, grid.offset + grid.scale * grid.low)
        return _Layer(replace(row, worst_bits=made.bound.bits), made, site, produced)

    def _grid(self, name: str, layer: QuantConv2d | QuantLinear) -> tuple[InputGrid, bool]:
        """The grid of the input, and whether another layer's activation makes it."""
        own = input_codes(layer)
        if own is not None:
            return InputGrid.of(own), False
        source = self.units.get(name, Unit()).source
        activation = self.modules.get(self.units.get(source or "", Unit()).activation or "")
        if not isinstance(activation, QuantActivation):
            raise UnsupportedLayerError(f"layer {name}: its input is at 32 bits")
        codes = output_codes(activation, source or "")
        if FLOAT in codes.bits or len(set(codes.scale.tolist())) > 1:
            raise UnsupportedLayerError(f"layer {name}: the channels of its input have scales of their own: no plain integer dot product")
        scale, steps = float(codes.scale[0]), int(codes.steps[0])
        return InputGrid(scale, 0.0, 1, 0, 0, steps), True

    def batch(self, batch: ExampleInputs) -> None:
        self.seen.clear()
        with self._hooked(self._remember):
            expected = _outputs(run(self.model, batch))
        if not expected:
            raise InputError("verify: the network has no output of floating point")
        samples = len(expected[0]) if expected[0].dim() else 1
        self.calls: dict[str, int] = {}
        self.diverged = torch.zeros(samples, dtype=torch.bool, device=expected[0].device)
        with self._hooked(self._replace):
            found = _outputs(run(self.model, batch))
        self.difference = max(self.difference, *(_relative(b - a, a) for a, b in zip(expected, found, strict=True)))
        self.samples += samples
        if expected[0].dim() == 2:
            self.ranked += samples
            self.same += int((expected[0].argmax(1) == found[0].argmax(1)).sum())

    @contextlib.contextmanager
    def _hooked(self, callback: Any) -> Iterator[None]:
        def hook(name: str) -> Any:
            return lambda module, args, kwargs, output: callback(name, module, first_input(args, kwargs), output)

        names = [*self.activations, *(n for n, layer in self.layers.items() if layer.integer is not None)]
        handles = [self.modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        site = self.activations.get(name)
        if site is not None:
            values = y
        else:
            assert isinstance(module, QuantConv2d | QuantLinear)
            layer, x = self.layers[name], _read(module, x)
            if layer.site is None or not _on_grid(layer, x):
                why = "its input lies between the levels of the activation that it reads"
                layer.integer, layer.row = None, replace(layer.row, status="float", worst_bits=0, reason=why)
                return
            site, values = layer.site, _quantized(module, layer, x)
        self.seen.setdefault(name, []).append((site.places(x), site.places(values).round()))

    def _compare(self, name: str, levels: Tensor) -> int:
        """How many levels differ from those of the first run."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        places, before = self.seen[name][call]
        other = levels != before
        changed = int(other.sum())
        if changed:
            # samples do not see each other: what is a first change, and what a consequence, each has of its own
            samples = len(self.diverged) if len(other) % len(self.diverged) == 0 else 1
            rows, distance = other.reshape(samples, -1), to_middle(places).reshape(samples, -1)
            same = ~self.diverged if samples > 1 else ~self.diverged.any(0, keepdim=True)
            first = rows & same.unsqueeze(1)
            self.boundary = max(self.boundary, float((distance * first).max()))
            self.diverged = self.diverged | rows.any(1)
        self.changed += changed
        return changed

    def _replace(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        if name in self.activations:
            site = self.activations[name]
            self._compare(name, site.levels(site.places(x)))
            return None
        assert isinstance(module, QuantConv2d | QuantLinear)
        layer = self.layers[name]
        assert layer.integer is not None and layer.site is not None
        made, site, x = layer.integer, layer.site, _read(module, x)
        if x.isnan().any():
            self._fail(layer, "its input is NaN: codes cannot say so")
            return None
        values = _quantized(module, layer, x)
        theirs, ours = site.places(values).round(), site.levels(site.places(x))
        changed = self._compare(name, ours)
        sums = made.accumulate(codes := made.grid.codes(theirs))
        layer.low, layer.high = min(layer.low, int(sums.min())), max(layer.high, int(sums.max()))
        result = made.rescale(sums, codes)
        self._judge(layer, module, values, result, y)
        other = theirs != ours
        flips = int(other.sum())
        ulps = 0.0
        if flips:
            places = (x[other].double() - site.offset) / site.scale
            ulps = float((to_middle(places) / (2 * EPSILON * places.abs().clamp_min(1))).max())
            codes = made.grid.codes(ours)
            result = made.rescale(made.accumulate(codes), codes)
        row = layer.row
        layer.row = replace(row, flips=row.flips + flips, ulps=max(row.ulps, ulps), changed=row.changed + changed)
        if ulps > TIE_ULPS:
            self._fail(layer, f"a code differs {ulps:.0f} units in the last place away from the boundary of its level")
        result = module.spread_out(result)
        if made.float.any():
            result = torch.where(_placed(module, _channels(module, made.float).float()) > 0, _flat(module, y), result)
        return result.reshape(y.shape)

    def _judge(self, layer: _Layer, module: QuantConv2d | QuantLinear, values: Tensor, result: Tensor, y: Tensor) -> None:
        """Compare a layer's integer output to its own, and to its own with exact sums, on the same codes."""
        weight = module.weight_quantizer(module.weight, module.one_hot)
        assert layer.site is not None and layer.integer is not None
        exact = apply(module, values, weight, torch.float64)
        # where a grid begins below zero, values near zero carry the rounding of its offset
        size = apply(module, values.abs() + abs(layer.site.offset), weight.abs(), torch.float64)
        if module.bias is not None:
            exact, size = exact + _channels(module, module.bias.double()), size + _channels(module, module.bias.double().abs())
        checked = (~_channels(module, layer.integer.float)).float()
        limit = (ROUNDINGS * EPSILON * size).clamp_min(torch.finfo(torch.float32).tiny)
        error = float(((result - exact).abs() / limit * checked).nan_to_num(torch.inf).max())
        if error > 1:
            self._fail(layer, f"its output differs {error:.3g} times as much as rounding can explain")
        theirs, ours = _flat(module, y), module.spread_out(result)
        unit = EPSILON if y.device.type == "cpu" else 2.0**-11  # TensorFloat-32
        allowed = _placed(module, limit + unit * weight[0].numel() * size)
        if not ((theirs - module.spread_out(exact)).abs() * _placed(module, checked) <= allowed).all():
            self._fail(layer, "the layer itself does not compute the convolution of its codes")
        # outputs that are zero but for rounding are no measure
        largest = max(float(theirs.abs().max()), float(size.max()) / 1000)
        row, difference = layer.row, float(((ours - theirs).abs() * _placed(module, checked)).max()) / (largest or 1.0)
        layer.row = replace(row, error=max(row.error, error), difference=max(row.difference, difference))

    def _fail(self, layer: _Layer, reason: str) -> None:
        if layer.row.status != "failed":
            layer.row = replace(layer.row, status="failed", reason=reason)

    def result(self) -> Verification:
        if not self.samples:
            raise InputError("verify: no batches were given")
        rows = tuple(self._row(name, layer) for name, layer in self.layers.items())
        agreement = self.same / self.ranked if self.ranked else None
        return Verification(rows, self.samples, self.difference, agreement, self.changed, self.boundary)

    def _row(self, name: str, layer: _Layer) -> LayerCheck:
        if layer.integer is None:
            return layer.row
        if name not in self.seen:
            return replace(layer.row, status="float", worst_bits=0, reason="it was not called")
        return replace(layer.row, observed_bits=signed_bits(layer.low, layer.high))


def _outputs(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def _on_grid(layer: _Layer, x: Tensor) -> bool:
    if not layer.produced:
        return True
    assert layer.site is not None
    places = layer.site.places(x)
    return bool((places - places.round()).abs().max() <= TIE_STEPS)


def _quantized(module: QuantConv2d | QuantLinear, layer: _Layer, x: Tensor) -> Tensor:
    return x if layer.produced else module.input_quantizer(x, torch.ones(1, device=x.device))


def _relative(difference: Tensor, of: Tensor) -> float:
    largest = float(of.abs().max())
    return float(difference.abs().max()) / largest if largest else float(difference.abs().max())


def _channels(layer: nn.Module, value: Tensor) -> Tensor:
    return value.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else value


def _read(layer: nn.Module, x: Tensor) -> Tensor:
    """What the weight meets, before it is quantized: [N, C, H, W] or [N, C]."""
    assert isinstance(layer, QuantConv2d | QuantLinear)
    x = x.reshape(-1, layer.in_features) if isinstance(layer, QuantLinear) else x if x.dim() == 4 else x.unsqueeze(0)
    return layer.gathered(x)


def _flat(layer: QuantConv2d | QuantLinear, y: Tensor) -> Tensor:
    """The layer's output as [N, C, H, W] or [N, C]."""
    return y.reshape(-1, layer.out_features) if isinstance(layer, QuantLinear) else y if y.dim() == 4 else y.unsqueeze(0)


def _placed(layer: QuantConv2d | QuantLinear, value: Tensor) -> Tensor:
    """Values of the filters where their outputs are, with zeros between."""
    if layer.spread is None:
        return value
    zero = torch.zeros_like(value.narrow(layer.spread.axis, 0, 1))
    return torch.cat([value, zero], layer.spread.axis).index_select(layer.spread.axis, layer.spread.index)
