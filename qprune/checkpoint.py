"""A network and its policy in one file: safetensors, with a JSON header, rebuilt from a function that builds the float network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from qprune.convert import convert
from qprune.errors import CheckpointError, PolicyMismatchError
from qprune.files import write_atomically
from qprune.geometry import Unit, weighted_layers
from qprune.nn.activation import QuantActivation
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.policy import LayerBits, Policy
from qprune.record import record_of, unwrap
from qprune.space import SearchSpace

FORMAT = 1


def policy_of(model: nn.Module) -> Policy:
    """The policy of a converted model, read from its layers."""
    record = record_of(model)
    geometry = record.geometry if record is not None else None
    activations = {name: module.channel_bits for name, module in unwrap(model).named_modules() if isinstance(module, QuantActivation)}
    layers = {}
    for name, layer in weighted_layers(unwrap(model)):
        if isinstance(layer, Quantizing):
            distinct = set(layer.w_bits)
            out = activations.get(geometry.units.get(name, Unit()).activation or "") if geometry is not None else None
            layers[name] = LayerBits(layer.w_bits[0] if len(distinct) == 1 else layer.w_bits, layer.a_bits, out)
    return Policy(layers, geometry)


def save(model: nn.Module, path: str | Path) -> None:
    """Write a converted (or float) model: its tensors, and in the header its policy and quantizers. The write is atomic; raises
    CheckpointError where the folder cannot be written, and for a model that is still being searched."""
    inner = unwrap(model)
    mixed = next((name for name, layer in weighted_layers(inner) if isinstance(layer, Mixing)), None)
    if mixed is not None:
        raise CheckpointError(f"save: layer {mixed!r} still has candidates; convert(model, policy) first, or save model.state_dict()")
    quantizers = {name: layer.space.quantizers for name, layer in weighted_layers(inner) if isinstance(layer, Quantizing)}
    header = {"format": "qprune", "version": str(FORMAT), "policy": policy_of(model).to_json(), "quantizers": json.dumps(quantizers)}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in inner.state_dict().items()}
    write_atomically(Path(path), to_bytes(tensors, header))


def load(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Read what `save` wrote: `build()` gives the float network, which is converted by the stored policy and filled with the stored
    tensors.

    Raises CheckpointError if the file is missing, damaged, not qprune's (a pickle, say), of a newer format, or of another network.
    """
    try:
        with Path(path).open("rb") as raw:
            start = raw.read(2)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(f"cannot read {path}: it is a pickle (torch.save), which qprune never opens; write it with qprune.save")
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: not a safetensors file, or damaged ({error})".splitlines()[0]) from None
    if header.get("format") != "qprune":
        raise CheckpointError(f"{path} was not written by qprune")
    if header.get("version") != str(FORMAT):
        raise CheckpointError(f"{path} has format {header.get('version')}; this version of qprune reads format {FORMAT}")
    try:
        policy = Policy.from_json(header["policy"])
        spaces = {name: SearchSpace(**names) for name, names in json.loads(header["quantizers"]).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: its header is damaged ({type(error).__name__}: {error})") from None
    try:
        model = convert(build(), policy, spaces)
        model.load_state_dict(tensors, strict=True)
    except (PolicyMismatchError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())}") from None
    return model
