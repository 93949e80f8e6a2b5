"""Networks whose layers can use their first filters only: make one, set its widths, cut a configuration out.

    net = slim(resnet20(), torch.zeros(1, 3, 32, 32))
    set_widths(net, {"conv1": 9, "layer1.0.conv1": 4})
    flops(net), extract(net)

After the pruning search of Zur et al. (1904.09872).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qprune.errors import InputError, UnsupportedLayerError
from qprune.geometry import ExampleInputs, Geometry, run, trace_geometry
from qprune.groups import channel_groups
from qprune.modes import kept_modes
from qprune.nn.slimlayers import SHORTCUTS, ResidualBlock, SlimBatchNorm2d, SlimBlock, SlimConv2d, SlimLinear, check_layer
from qprune.nn.slimorder import ORDERS, sort_filters
from qprune.nn.slimtrace import SlimStructure, Widths, trace_structure, watching
from qprune.nn.surgery import copy_model, replace_modules, take_over
from qprune.policy import Policy
from qprune.record import Record, attach, record_of
from qprune.space import PRUNED
from qprune.wrappers import unwrap

RATIOS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class SlimState:
    """What a slim network knows of itself; `widths` are the ones set now."""

    structure: SlimStructure
    ratios: tuple[float, ...]
    widths: dict[str, int]


def slim(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ratios: Sequence[float] = RATIOS,
    shortcut: str = "permanent",
    order: str = "index",
) -> nn.Module:
    """A copy of a float network in which every convolution can have fewer filters: the first ones.

    example_inputs  for one call
    ratios          the homogeneous widths, each with normalisation of its own
    shortcut        "permanent" or "temporary": where block input and output differ in width (see SlimBlock)
    order           which filters come first: "index", as they are (the original); ours: the most important ones, by "l1" norm of the
                    filter or by "gamma", the size of its normalisation's scale. Filters that an identity shortcut adds up keep one order,
                    that of their sum

    Networks are chains of convolutions, BatchNorm2d, residual blocks of two convolutions (as torchvision's BasicBlock, or that of
    `tasks.resnet`) and linear layers, with anything between that does not care for the number of channels. All widths are full at first,
    and the network then computes what the given one does. Raises UnsupportedLayerError, with the reason, for anything else.
    """
    if shortcut not in SHORTCUTS:
        raise InputError(f"slim: unknown shortcut {shortcut!r}; expected one of {', '.join(SHORTCUTS)}")
    if order not in ORDERS:
        raise InputError(f"slim: unknown order {order!r}; expected one of {', '.join(ORDERS)}")
    net = copy_model(unwrap(model))
    blocks = {module: ResidualBlock.of(module) for module in net.modules()}
    net = replace_modules(net, {old: new for old, new in blocks.items() if new is not None})
    for name, layer in net.named_modules():
        check_layer(name, layer)
    structure = trace_structure(net, example_inputs)
    if not structure.layers:
        raise UnsupportedLayerError("slim: the network has no convolution whose width could be changed")
    for ratio in ratios:
        structure.homogeneous(ratio)
    orders = sort_filters(net, structure, order)
    geometry = Geometry(trace_geometry(net, example_inputs), channel_groups(net, example_inputs))
    net = _replaced(net, structure, ratios, shortcut, orders)
    net.__dict__["qprune_slim"] = SlimState(structure, tuple(ratios), {name: layer.filters for name, layer in structure.layers.items()})
    attach(net, Record(geometry))
    _check(net, unwrap(model), structure, example_inputs)
    return net


def _replaced(net: nn.Module, structure: SlimStructure, ratios: Sequence[float], shortcut: str, orders: Mapping[str, Tensor]) -> nn.Module:
    modules, swaps = dict(net.named_modules()), dict[nn.Module, nn.Module]()
    homogeneous = [structure.homogeneous(ratio) for ratio in ratios]
    outputs = {name: name for name in structure.layers} | {s.own: s.target for s in structure.shortcuts if s.own}
    for name, layer in modules.items():
        if isinstance(layer, nn.Conv2d) and name in outputs:
            swaps[layer] = SlimConv2d.from_float(layer, orders[outputs[name]])
        elif isinstance(layer, nn.BatchNorm2d) and name in structure.norms:
            swaps[layer] = SlimBatchNorm2d.from_float(layer, [widths[structure.norms[name]] for widths in homogeneous])
        elif isinstance(layer, nn.Linear) and name in structure.linears:
            swaps[layer] = SlimLinear.from_float(layer)
    net = replace_modules(net, swaps)
    return replace_modules(net, {b: SlimBlock(b, shortcut) for b in net.modules() if isinstance(b, ResidualBlock)})


def _check(net: nn.Module, original: nn.Module, structure: SlimStructure, example_inputs: ExampleInputs) -> None:
    """Raise UnsupportedLayerError unless the network computes what the original does at full width, and runs at uneven ones."""
    with kept_modes(net), kept_modes(original), torch.no_grad():
        expected, got = run(original.eval(), example_inputs), run(net.eval(), example_inputs)
        if not isinstance(got, Tensor):
            raise UnsupportedLayerError(f"slim: the network returns a {type(got).__name__}; expected one tensor")
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise UnsupportedLayerError(
                "slim: rebuilt of plain residual blocks, relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut), the network computes something "
                "else; other kinds of blocks cannot be made slim"
            )
        full = current_widths(net)
        for step in (1, 2):
            widths = {name: max(1, full[name] - step * (1 + i % 3)) for i, name in enumerate(full)}
            set_widths(net, widths)
            try:
                with watching(net, structure, widths):
                    _mark_estimated(net)
                    run(net, example_inputs)
            except (RuntimeError, ValueError) as error:
                raise UnsupportedLayerError(f"slim: the network does not run at layers of different width: {error}") from None
        set_widths(net, full)
        _mark_estimated(net)


def _mark_estimated(net: nn.Module) -> None:
    """Let eval mode use whatever statistics there are: an example may be too small for its own."""
    for module in net.modules():
        if isinstance(module, SlimBatchNorm2d):
            module.estimated = True


def state_of(model: nn.Module) -> SlimState:
    """Raises InputError for a network that is not from `slim`."""
    state = unwrap(model).__dict__.get("qprune_slim")
    if not isinstance(state, SlimState):
        raise InputError(f"{type(unwrap(model)).__name__} is not a slim network; make one with qprune.nn.slim.slim(model, example_inputs)")
    return state


def current_widths(model: nn.Module) -> dict[str, int]:
    """Convolution → its active filters; shortcuts follow conv2 of their block."""
    return dict(state_of(model).widths)


def homogeneous(model: nn.Module, ratio: float) -> dict[str, int]:
    """The widths at one share of all filters, rounded down, at least 1."""
    return state_of(model).structure.homogeneous(ratio)


def set_widths(model: nn.Module, widths: Widths) -> None:
    """Use the first widths[layer] filters of every layer named; others stay as they are.

    A configuration in which all layers have one of the ratios uses that ratio's normalisation; any other one normalises by the batch until
    `reestimate`. Raises InputError for an unknown layer or an impossible width.
    """
    state, net = state_of(model), unwrap(model)
    state.structure.check(widths)
    merged = {**state.widths, **widths}
    if merged == state.widths:
        return
    state.widths = merged
    ratio = next((i for i, r in enumerate(state.ratios) if state.structure.homogeneous(r) == merged), None)
    modules = dict(net.named_modules())
    for name, width in merged.items():
        conv = modules[name]
        assert isinstance(conv, SlimConv2d)
        conv.width = width
    for s in state.structure.shortcuts:
        block = modules[s.block]
        assert isinstance(block, SlimBlock)
        block.connect(s.inputs if s.source is None else merged[s.source])
    for module in net.modules():
        if isinstance(module, SlimBatchNorm2d):
            module.ratio, module.estimated = (ratio if len(module.norms) > 0 else None), False


def widths_of(model: nn.Module, policy: Policy) -> dict[str, int]:
    """The widths that a policy of method slimmable stands for: the filters that are not at 0 bits. Raises PolicyMismatchError for a policy
    of another network."""
    record = record_of(model)
    if record is not None and record.geometry is not None:
        policy.check(record.geometry)
    layers = state_of(model).structure.layers.values()
    return {layer.name: sum(b != PRUNED for b in policy.bits(layer.name).per_filter(layer.filters)) for layer in layers}


def flops(model: nn.Module, widths: Widths | None = None) -> int:
    """Multiplications per sample of all convolutions at the present widths, or at those given (see SlimStructure.flops)."""
    structure = state_of(model).structure
    merged = {**current_widths(model), **(widths or {})}
    structure.check(merged)
    return int(structure.flops(structure.vector(merged)))


@contextmanager
def estimating(model: nn.Module) -> Iterator[None]:
    """Within, every forward pass of the model adds a batch to the statistics of the present configuration, all weighted equally; modules
    other than normalisation are in eval mode. Homogeneous configurations keep the statistics they trained with."""
    norms = [module for module in unwrap(model).modules() if isinstance(module, SlimBatchNorm2d) and module.ratio is None]
    with kept_modes(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
            norm.batches = 0
        try:
            yield
        finally:
            for norm in norms:
                norm.estimated, norm.batches = bool(norm.batches), None


def reestimate(model: nn.Module, batches: Iterable[ExampleInputs]) -> None:
    """Normalise the present configuration, in eval mode, by its mean statistics over these inputs (1903.05134 calls it
    post-statistics)."""
    with estimating(model):
        for batch in batches:
            run(model, batch)


def extract(model: nn.Module, widths: Widths | None = None, batches: Iterable[ExampleInputs] = ()) -> nn.Module:
    """A network of nn.Conv2d, nn.BatchNorm2d, nn.Linear and ResidualBlock that has the active filters only, with copies of their weights.

    widths   None: the present ones
    batches  inputs to `reestimate` the statistics from

    In eval mode it computes what the slim network does, if that has statistics: without batches, those of a configuration that is not
    homogeneous and was not re-estimated since it was set start at mean 0 and variance 1 and need training.
    """
    net = copy_model(unwrap(model))
    state = state_of(net)
    set_widths(net, widths or {})
    if batches:
        reestimate(net, batches)
    modules, structure, swaps = dict(net.named_modules()), state.structure, dict[nn.Module, nn.Module]()
    inputs = {layer.name: layer.inputs if layer.source is None else state.widths[layer.source] for layer in structure.layers.values()}
    for s in structure.shortcuts:
        source, block = s.inputs if s.source is None else state.widths[s.source], modules[s.block]
        assert isinstance(block, SlimBlock)
        if s.own is not None:
            inputs[s.own] = source
        elif block.bridged(source):
            assert block.bridge is not None and block.bridge_bn is not None
            bridge = (_plain_conv(block.bridge, source), block.bridge_bn.plain(state.widths[s.target]))
            swaps[block] = ResidualBlock((block.conv1, block.bn1, block.relu1), (block.conv2, block.bn2, block.relu2), bridge)
        if block not in swaps:
            own = None if block.shortcut is None or block.shortcut_bn is None else (block.shortcut, block.shortcut_bn)
            swaps[block] = ResidualBlock((block.conv1, block.bn1, block.relu1), (block.conv2, block.bn2, block.relu2), own)
        swaps[block].training = block.training
    for name, channels in inputs.items():
        conv = modules[name]
        assert isinstance(conv, SlimConv2d)
        swaps[conv] = _plain_conv(conv, channels)
    for name, of in structure.norms.items():
        norm = modules[name]
        assert isinstance(norm, SlimBatchNorm2d)
        swaps[norm] = norm.plain(state.widths[of])
    for name, of in structure.linears.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        swaps[linear] = _plain_linear(linear, linear.in_features // structure.layers[of].filters * state.widths[of])
    for block in [b for b in swaps if isinstance(b, SlimBlock)]:
        replace_modules(swaps[block], swaps)
    net = replace_modules(net, swaps)
    for attribute in ("qprune_slim", "qprune_record"):
        net.__dict__.pop(attribute, None)
    return net


@torch.no_grad()
def _plain_conv(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    weight, bias = conv.active(channels) if isinstance(conv, SlimConv2d) else (conv.weight, conv.bias)

    def cut(new: nn.Conv2d) -> None:
        channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        new.weight = nn.Parameter(weight.clone(memory_format=layout), conv.weight.requires_grad)
        new.bias = None if bias is None else nn.Parameter(bias.clone(), bias.requires_grad)
        new.in_channels, new.out_channels = channels, len(weight)
        for name in ("width", "order"):
            new.__dict__.pop(name, None)
            new._buffers.pop(name, None)

    return take_over(nn.Conv2d, conv, cut)


def _plain_linear(linear: nn.Linear, features: int) -> nn.Linear:
    def cut(new: nn.Linear) -> None:
        new.weight = nn.Parameter(linear.weight[:, :features].detach().clone(), linear.weight.requires_grad)
        new.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        new.in_features = features

    return take_over(nn.Linear, linear, cut)
