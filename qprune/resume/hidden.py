"""What a module holds and its state_dict leaves out: buffers that are not persistent, modes, and flags."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


def hidden_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name → its other tensors and its attributes that are numbers, strings, True, False or None; "" is the model itself."""
    return {name: {**_buffers(module), **_flags(module)} for name, module in model.named_modules()}


def load_hidden_state(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Set what `hidden_state` found in a model of the same structure. Names that are not there now are left alone.
    Raises TypeError for a value that an attribute cannot have."""
    for name, module in model.named_modules():
        for key, value in state.get(name, {}).items():
            if isinstance(value, Tensor):
                old = module._buffers.get(key)
                module._buffers[key] = value if old is None else value.to(old.device)
            elif type(module.__dict__.get(key, ())) in _PLAIN and module.__dict__[key] != value:
                if type(value) not in _PLAIN:
                    raise TypeError(f"{name}.{key} is a {type(value).__name__}")
                module.__dict__[key] = value


def _buffers(module: nn.Module) -> dict[str, Any]:
    found = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    return {name: value for name, value in found.items() if value is not None}


def _flags(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if type(value) in _PLAIN}
