"""A network and its policy in one file: safetensors, with a JSON header, rebuilt from a function that builds the float network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from qprune._version import __version__
from qprune.convert import converted, without_pruned
from qprune.errors import CheckpointError, PolicyMismatchError, SpaceError
from qprune.files import write_atomically
from qprune.folding import folded, refold
from qprune.geometry import Unit, weighted_layers
from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import blank_codebook, codebook_layers
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.nn.surgery import replace_modules
from qprune.plainjson import parse
from qprune.policy import LayerBits, Policy
from qprune.quantizers import StoredUniqWeightQuantizer, StoredWeightQuantizer
from qprune.record import Record, record_of
from qprune.space import SearchSpace
from qprune.wrappers import unwrap

PLAIN, SMALLER = "1", "2"
"""Formats: of networks that have all their filters, in place or as zeros, and of those that some were taken out of."""


def policy_of(model: nn.Module) -> Policy:
    """The policy of a converted model: read from its layers, or that by which it was made smaller, with the geometry that it had before."""
    record = record_of(model)
    if record is not None and record.removal is not None and record.removal.removed:
        return record.removal.policy
    geometry = record.geometry if record is not None else None
    activations = {name: module.channel_bits for name, module in unwrap(model).named_modules() if isinstance(module, QuantActivation)}
    layers = {}
    for name, layer in weighted_layers(unwrap(model)):
        if isinstance(layer, Quantizing):
            distinct = set(layer.w_bits)
            out = activations.get(geometry.units.get(name, Unit()).activation or "") if geometry is not None else None
            layers[name] = LayerBits(layer.w_bits[0] if len(distinct) == 1 else layer.w_bits, layer.a_bits, out)
    return Policy(layers, geometry)


def structure_of(model: nn.Module) -> dict[str, str]:
    """What `rebuild` needs besides the function that builds the float network: policy, with the geometry; what happened to pruned filters;
    quantizers, codebooks and folded normalisations, as JSON. Raises CheckpointError for a model that is still being searched."""
    inner = unwrap(model)
    mixed = next((name for name, layer in weighted_layers(inner) if isinstance(layer, Mixing)), None)
    if mixed is not None:
        raise CheckpointError(f"save: layer {mixed!r} still has candidates; convert(model, policy) first, or save model.state_dict()")
    quantizers = {name: layer.space.quantizers for name, layer in weighted_layers(inner) if isinstance(layer, Quantizing)}
    header = {"policy": policy_of(model).to_json(), "quantizers": json.dumps(quantizers)}
    record = record_of(model)
    if record is not None and record.removal is not None:
        header["removal"] = json.dumps({"removed": record.removal.removed, "round_to": record.removal.round_to})
    codebooks = {name: layer.settings for name, layer in codebook_layers(inner)}
    if codebooks:
        header["codebooks"] = json.dumps(codebooks)
    if folded(inner):
        header["folded"] = json.dumps(folded(inner))
    return header


def save(model: nn.Module, path: str | Path) -> None:
    """Write a converted (or float) model: its tensors, and in the header its policy and quantizers. The write is atomic; raises
    CheckpointError where the folder cannot be written, for a model that is still being searched, and for one of packed codes."""
    inner = unwrap(model)
    known, stored = folded(inner), StoredWeightQuantizer | StoredUniqWeightQuantizer
    if any(isinstance(q, stored) and name.removesuffix(".weight_quantizer") not in known for name, q in inner.named_modules()):
        raise CheckpointError("save: the network was read from packed codes and has no latent weights; write it with save_packed")
    structure = structure_of(model)
    header = {"format": "qprune", "version": SMALLER if "removal" in structure else PLAIN, "library": __version__, **structure}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in inner.state_dict().items()}
    write_atomically(Path(path), to_bytes(tensors, header))


def load(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Read what `save` wrote: `build()` gives the float network, which is converted by the stored policy and filled with the stored
    tensors.

    Raises CheckpointError if the file is missing, damaged, not qprune's (a pickle, say), of a newer format, or of another network.
    """
    header, tensors = read(path)
    if header.get("format") != "qprune":
        raise CheckpointError(f"{path} was not written by qprune")
    if header.get("version") not in (PLAIN, SMALLER):
        raise CheckpointError(
            f"{path} has format {header.get('version', '–')[:40]}, written by qprune {header.get('library', 'of another time')[:40]}; "
            f"this is qprune {__version__}, which reads formats {PLAIN} and {SMALLER}"
        )
    model = rebuild(header, build, path)
    try:
        model.load_state_dict(tensors, strict=True)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())}") from None
    return model


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises CheckpointError if it is missing, damaged, or a pickle."""
    try:
        with Path(path).open("rb") as raw:
            start = raw.read(9)
        # a safetensors file begins with the length of its header, 8 bytes of any value
        if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise CheckpointError(f"cannot read {path}: it is a pickle (torch.save), which qprune never opens; write it with qprune.save")
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: not a safetensors file, or damaged ({error})".splitlines()[0]) from None


def rebuild(header: Mapping[str, str], build: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """The network of `structure_of`'s header, its tensors still to be filled. Raises CheckpointError, with the path of the file that the
    header is from, if the header is damaged or does not fit what `build` makes."""
    try:
        policy = Policy.from_json(header["policy"])
        spaces = {name: SearchSpace(**names) for name, names in parse(header["quantizers"]).items()}
        codebooks = {name: dict(settings) for name, settings in parse(header.get("codebooks", "{}")).items()}
        removed, round_to = _removal(parse(header["removal"])) if "removal" in header else (None, 1)
        folds = {name: dict(settings) for name, settings in parse(header.get("folded", "{}")).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: its header is damaged ({type(error).__name__}: {error})") from None
    try:
        rest = Policy({name: bits for name, bits in policy.layers.items() if name not in codebooks}, policy.geometry)
        net = _with_codebooks(converted(build(), rest, spaces, None if codebooks else removed, round_to), codebooks)
        if codebooks and removed is not None:
            net = without_pruned(net, Record(policy.geometry), policy, removed, round_to)
        return refold(net, folds)
    except (PolicyMismatchError, SpaceError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())}") from None


def _removal(data: Any) -> tuple[bool, int]:
    removed, round_to = data["removed"], data["round_to"]
    if not isinstance(removed, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"removal is {data!r}")
    return removed, round_to


def _with_codebooks(model: nn.Module, codebooks: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The model with layers that the file's codebooks, masks and latent weights fit in."""
    layers = dict(weighted_layers(model))
    swaps: dict[nn.Module, nn.Module] = {}
    for name, settings in codebooks.items():
        layer = layers.get(name)
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise PolicyMismatchError(f"it has a codebook for layer {name!r}, which is no convolution or linear layer here")
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        swaps[layer] = made = blank_codebook(layer, **settings)
        made.layer_name = name
    return replace_modules(model, swaps)
