"""Networks of torchvision and timm by name, without weights; the packages are imported when they are asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels import QPruneError

LIBRARIES = {"torchvision": "qprune[vision]", "timm": "timm"}
"""Package → what pip installs it with."""


class ModelError(QPruneError, ValueError):
    """No network has this name, or the network cannot be had."""


def from_library(name: str, num_classes: int, in_channels: int, options: Mapping[str, object]) -> Any:
    """ "torchvision:resnet18" or "timm:mobilenetv3_small_100". Raises ModelError for a missing package and an unknown name."""
    library, _, network = name.partition(":")
    if library == "timm":
        timm = _package("timm", "timm")
        _known(name, network, timm.list_models())
        return timm.create_model(network, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)
    models = _package("torchvision.models", "torchvision")
    _known(name, network, models.list_models(module=models))
    if in_channels != 3:
        raise ModelError(f"{name} takes images of 3 channels, the data has {in_channels}")
    return models.get_model(network, weights=None, num_classes=num_classes, **options)


def _package(module: str, library: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a torchvision built for another torch raises whatever its first failing operator does
        reason = " ".join(str(error).split())
        raise ModelError(f"{library} cannot be imported ({type(error).__name__}: {reason}); pip install '{LIBRARIES[library]}'") from error


def _known(name: str, network: str, names: Sequence[str]) -> None:
    plain = network.partition(".")[0]  # timm: architecture.weights
    if plain in names:
        return
    near = difflib.get_close_matches(plain, names, n=3)
    raise ModelError(f"unknown model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(names)} others"))
