"""Pretrained weights from a file, into a network that is already there."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .order import DataError

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
"""Names under which training programs keep a network's tensors, in the order in which they are looked for."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of every name."""
NAMED = 5


class WeightsError(DataError):
    """A file of weights that cannot be read, or that belongs to another network."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` with the tensors of a .safetensors file, or of one of torch.save, of which only tensors and plain values are read
    (weights_only). All names and shapes must agree. Raises WeightsError, and the model is then as it was."""
    tensors = _without_prefix(_read(Path(path)))
    own = model.state_dict()
    # files from before torch 0.4.1 have no such counters, and they matter only to a BatchNorm without momentum
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked") and name not in tensors}
    tensors = {**tensors, **counters}
    missing, strange = [name for name in own if name not in tensors], [name for name in tensors if name not in own]
    if missing or strange:
        raise WeightsError(f"{path} is not of this network: {_listed('it lacks', missing)}{_listed('it has', strange)}")
    other = [(name, list(tensors[name].shape), list(value.shape)) for name, value in own.items() if tensors[name].shape != value.shape]
    shapes = [f"{name} {there}, here {here}" for name, there, here in other]
    if shapes:
        raise WeightsError(
            f"{path} does not fit: {_listed('shapes of', shapes)}is it for another number of classes, or of input channels? For another "
            "head, load the file in a function of your own (--model module:function)"
        )
    kinds = [f"{name} {_kind(tensors[name])}, here {_kind(value)}" for name, value in own.items() if _kind(tensors[name]) != _kind(value)]
    if kinds:
        raise WeightsError(f"{path} does not fit: {_listed('kinds of', kinds)}expected plain tensors of numbers of the same kind")
    bad = next((name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())), None)
    if bad is not None:
        raise WeightsError(f"{path}: {bad} has values that are not finite")
    model.load_state_dict(tensors)


def _kind(value: Tensor) -> str:
    """What must agree for its numbers to be copied; their precision need not."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return "of no plain layout"
    return "float" if value.is_floating_point() else "complex" if value.is_complex() else "whole"


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}; "


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is no safetensors file, or damaged: {' '.join(str(error).split())}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of a pickle protocol that it may not read
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not opened because it could run code; "
            "save model.state_dict() alone"
        ) from None
    except Exception as error:  # what the unpickler meets in a damaged file raises anything
        raise WeightsError(f"{path} is neither a .safetensors file nor one of torch.save, or damaged ({type(error).__name__})") from None
    return _tensors(path, content)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in content.items()):
        raise WeightsError(f"{path} does not hold a state_dict, alone or under one of the names {', '.join(WRAPPERS)}")
    return dict(content)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*PREFIXES, *PREFIXES):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
