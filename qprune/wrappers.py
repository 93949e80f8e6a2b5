"""Models inside the wrappers that others put around them."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    return _layers(model)[-1]


def distributed(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel wrapper around the model, if it has one."""
    return next((layer for layer in _layers(model) if type(layer).__name__ == "DistributedDataParallel"), None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """From the outermost wrapper to the model itself."""
    found = [model]
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return found
        found.append(inner)
        model = inner
