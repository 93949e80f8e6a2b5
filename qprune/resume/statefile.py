"""A nested state in one safetensors file: tensors as tensors, everything else as JSON in the header, and a digest of both.

Loading runs no code of the file. What can be stored: dicts with string or integer keys, lists, tuples, tensors, numbers, strings, None.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from qprune.checkpoint import read
from qprune.errors import CheckpointError
from qprune.files import write_atomically
from qprune.plainjson import parse

FORMAT = "qprune-run"
VERSION = "1"


def write_state(path: Path, state: Any) -> None:
    """Write atomically. Raises CheckpointError where the file cannot be written, TypeError for what cannot be stored."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, "", tensors))
    write_atomically(path, to_bytes(tensors, {"format": FORMAT, "version": VERSION, "state": text, "digest": _digest(text, tensors)}))


def read_state(path: Path) -> Any:
    """What `write_state` wrote, tensors on the CPU. Raises CheckpointError if the file is missing, damaged in a single bit, or another
    kind of file."""
    header, tensors = read(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a run")
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {header.get('version')}; this version of qprune reads version {VERSION}")
    text = header.get("state", "")
    if header.get("digest") != _digest(text, tensors):
        raise CheckpointError(f"{path} is damaged: its contents do not give the digest that it was written with")
    try:
        return _unpack(parse(text), tensors)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a run ({type(error).__name__} in its header)") from None


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        tensors[place] = dense.contiguous().clone()
        # the order in memory decides which elements are computed together, and so their last bits
        return {"tensor": place} if _plain_order(dense) else {"tensor": place, "stride": list(dense.stride())}
    if isinstance(value, dict):
        return {"dict": [[_key(key), _pack(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place}: a checkpoint cannot hold a {type(value).__name__}")


def _plain_order(value: Tensor) -> bool:
    """The last dimension is next to itself in memory and so on; or the elements lie apart, so that there is no order to keep."""
    return value.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(value)


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"a checkpoint cannot hold the key {key!r}")
    return key  # type: ignore[no-any-return]


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        found = tensors[value["tensor"]]
        if "stride" in value:
            if 1 + sum((size - 1) * step for size, step in zip(found.shape, value["stride"], strict=True)) != found.numel():
                raise ValueError("strides with gaps")
            return torch.empty_strided(found.shape, value["stride"], dtype=found.dtype).copy_(found)
        return found.clone()  # into memory that is aligned as torch aligns it
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return {key: _unpack(item, tensors) for key, item in value["dict"]}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
