"""A converted network in the fewest bytes: every weight as a code of its own width, all codes in one stream of bits.

The file is a safetensors file. What it holds, in this order of `PackedSizes`:

    codes      layer by layer, and in a layer by ascending width, the levels of `qprune.codes.weight_codes`, b bits each; filters of 0 bits
               have none, filters of 32 bits and float layers float32. Of layers with codebooks: the codes of the weights that are kept
    index      which weights of layers with codebooks are kept (see qprune.masks)
    codebooks  float32: their shared values, and the levels of "uniq" weights
    scales     float32: of quantized layers one per filter, as `cost` counts them, and the logarithm of the input's range
    tensors    everything else of the state_dict: biases, normalisations, offsets and signs of inputs
    header     policy and geometry (JSON, deflated), and safetensors' own

A SHA-256 over all of it tells a damaged file.

`codes` are as many bits as `cost` counts for the policy. There are more in a file of a network that was converted with remove=False, where
weights that read pruned channels stay; and none for filters at 0 bits that a grouped convolution or round_to keeps, which `cost` counts.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from qprune.bitstream import Array, BitReader, BitWriter
from qprune.checkpoint import read, rebuild, structure_of
from qprune.errors import CheckpointError, InputError
from qprune.export.streams import STREAMS, read_layer, to_numpy, write_codebook, write_quantized
from qprune.files import write_atomically
from qprune.geometry import weighted_layers
from qprune.masks import Index
from qprune.modes import kept_modes
from qprune.nn.codebook import CodebookLayer
from qprune.nn.quantizing import Quantizing
from qprune.wrappers import unwrap

FORMAT = 1
MAGIC = "qprune-packed"
_CHECKSUM = "packed.sha256"
INDEXES = ("plain", "entropy")
_MOST_HEADER = 1 << 28  # bytes of JSON: a file may claim more, but no network needs it


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of a packed file, by what they hold (see the module); the bits of a stream are rounded up to whole bytes."""

    codes: int
    index: int
    codebooks: int
    scales: int
    tensors: int
    header: int

    @property
    def total(self) -> int:
        """The size of the file."""
        return sum(vars(self).values())


def save_packed(model: nn.Module, path: str | Path, index: str = "entropy") -> PackedSizes:
    """Write a converted (or float) network with its weights as packed codes, atomically, and say where the bytes go.

    index  how masks of layers with codebooks are written: "plain", one bit per weight, or "entropy", the shortest that qprune.masks knows,
           which takes about a second per million weights

    Codes and scales are exact: the network that `load_packed` reads computes bit for bit the same in eval mode. Latent weights are not
    kept: to train on, use `qprune.save`. Raises CheckpointError for a model that is still being searched, for quantized layers that are not
    float32, and where the folder cannot be written.
    """
    if index not in INDEXES:
        raise InputError(f"save_packed: index is one of {', '.join(INDEXES)}, got {index!r}")
    inner = unwrap(model)
    structure: dict[str, Any] = dict(structure_of(model))
    streams = {name: BitWriter() for name in STREAMS}
    with kept_modes(inner), torch.no_grad():
        inner.eval()
        books = {}
        packed = dict(_packed_layers(inner))
        for name, layer in packed.items():
            if isinstance(layer, CodebookLayer):
                books[name] = write_codebook(layer, streams, index == "entropy")
            elif isinstance(layer, Quantizing):
                write_quantized(name, layer, streams)
            else:
                streams["codes"].write_floats(to_numpy(layer.weight))
    if books:
        structure["books"] = books
    state = {f"state.{name}": value.detach().cpu().contiguous().clone() for name, value in _rest(inner, set(packed.values())).items()}
    header = zlib.compress(json.dumps(structure).encode(), 9)
    content = {f"packed.{name}": _bytes(s.getvalue()) for name, s in streams.items() if s.bits}
    content["packed.header"] = _bytes(header)
    content |= state
    content[_CHECKSUM] = _digest(content)
    file = to_bytes(content, {"format": f"{MAGIC}/{FORMAT}"})
    write_atomically(Path(path), file)
    parts = {name: -(-s.bits // 8) for name, s in streams.items()} | {"tensors": sum(t.nbytes for t in state.values())}
    return PackedSizes(**parts, header=len(file) - sum(parts.values()))


def load_packed(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Read what `save_packed` wrote: `build()` gives the float network, which is converted by the stored policy. The result is in eval
    mode; weights of quantized layers lie on their grids, have no gradient, and stay as they are.

    Raises CheckpointError if the file is missing, damaged, not a packed network, of a newer format, or of another network.
    """
    metadata, tensors = read(path)
    magic, _, version = metadata.get("format", "").partition("/")
    if magic != MAGIC:
        hint = "; read it with qprune.load" if magic == "qprune" else ""
        raise CheckpointError(f"{path} is not a packed network{hint}")
    if version != str(FORMAT):
        raise CheckpointError(f"{path} has packed format {version}; this version of qprune reads format {FORMAT}")
    if not torch.equal(tensors.pop(_CHECKSUM, torch.zeros(0)), _digest(tensors)):
        raise CheckpointError(f"cannot read {path}: it is damaged, its content has another checksum")
    structure = _structure(tensors.pop("packed.header", None), path)
    try:
        books = {name: (Index.from_json(index), int(numbers)) for name, (index, numbers) in structure.pop("books", {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: its header is damaged ({type(error).__name__}: {error})") from None
    model = rebuild(structure, build, path).eval()
    streams = {name: BitReader(_stream(tensors.pop(f"packed.{name}", None))) for name in STREAMS}
    try:
        with torch.no_grad():
            packed = dict(_packed_layers(model, tensors))
            for name, layer in packed.items():
                read_layer(name, layer, streams, books)
            for stream in streams.values():
                stream.finish()
            _fill(_rest(model, set(packed.values())), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit this network: {error}") from None
    return model


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of names, types, shapes and values, uint8 [32]."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if value.numel():
            found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return _bytes(found.digest())


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _stream(content: Tensor | None) -> Array:
    """The bytes of a tensor of the file; none for a tensor that is missing, or of another kind."""
    return np.zeros(0, np.uint8) if content is None or content.dtype != torch.uint8 else content.flatten().numpy()


def _structure(header: Tensor | None, path: str | Path) -> dict[str, Any]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(_stream(header).tobytes(), _MOST_HEADER)
        if not inflate.eof:
            raise ValueError(f"it is missing, cut short, or has more than {_MOST_HEADER} bytes")
        structure = json.loads(text)
        if not isinstance(structure, dict):
            raise ValueError(f"expected an object, got {type(structure).__name__}")
    except (ValueError, zlib.error, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: its header is damaged ({type(error).__name__}: {error})") from None
    return structure


def _packed_layers(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Any]]:
    """The layers whose weights are in the stream of codes: of float layers those of float32, or that have none among the file's tensors."""
    for name, layer in weighted_layers(model):
        if isinstance(layer, Quantizing | CodebookLayer):
            yield name, layer
        elif isinstance(layer.weight, Tensor):
            key = f"state.{name}.weight" if name else "state.weight"
            if layer.weight.dtype == torch.float32 if tensors is None else key not in tensors:
                yield name, layer


def _rest(model: nn.Module, packed: Collection[nn.Module]) -> dict[str, Tensor]:
    """The tensors of the state_dict that no stream holds, shared ones once. packed: the layers whose weights are in streams."""
    held: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in packed:
            own = ("weight", "mask", "codebook") if isinstance(module, CodebookLayer) else ("weight",)
            ranges = ("weight_quantizer.log_range", "weight_quantizer.scale", "input_quantizer.log_range")
            held |= {f"{name}.{key}" if name else key for key in (*own, *(ranges if isinstance(module, Quantizing) else ()))}
    rest: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} of the network's state is a {type(value).__name__}; a packed file holds tensors only")
        if name not in held and id(value) not in seen:
            seen.add(id(value))
            rest[name] = value
    return rest


def _fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy the file's tensors into those of the network."""
    names = {f"state.{name}" for name in expected}
    if wrong := sorted(names ^ tensors.keys()):
        raise CheckpointError(f"{'missing' if wrong[0] in names else 'unexpected'} tensor {wrong[0].removeprefix('state.')!r}")
    for name, target in expected.items():
        value = tensors[f"state.{name}"]
        if value.shape != target.shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)} in the file, {tuple(target.shape)} here")
        if value.is_floating_point() != target.is_floating_point():
            raise CheckpointError(f"{name} is {value.dtype} in the file, {target.dtype} here")
        target.data = value.to(target.device)
