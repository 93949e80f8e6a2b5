"""Finding where numbers went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import NonFiniteError
from qprune.gates import Constant, Gate
from qprune.quantizers import Quantizer
from qprune.ranks import Ranks
from qprune.wrappers import unwrap


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, closure: Callable[[], object]) -> str | None:
    """Name of the first module, in the order in which they finish, whose output holds NaN or infinity while `closure` runs the forward.

    Children finish before their parents, so a leaf is named before the block around it; a block is named where its own arithmetic
    overflows, and "" is the model itself. None if all outputs are finite. Buffers are left as they were.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else (output,)
            tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
            if not found and not all(bool(value.isfinite().all()) for value in tensors):
                found.append(name)

        return hook

    inner = unwrap(model)
    buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
    # a mixed layer is named itself, not its parts
    layers = [(name, module) for name, module in inner.named_modules() if not isinstance(module, Gate | Constant | Quantizer)]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        closure()
    finally:
        for handle in handles:
            handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    return found[0] if found else None


def refusal(step: int, loss: float, layer: str | None, ranks: Ranks) -> NonFiniteError:
    """The error of the first of the ranks whose loss is not finite; every one gives its own, and the layer where it was found."""
    found = ranks.gathered((loss, layer))
    rank, (loss, layer) = next((rank, found) for rank, found in enumerate(found) if not math.isfinite(found[0]))
    return NonFiniteError(step, layer, loss, rank=None if ranks.alone else rank)


@torch.no_grad()
def nonfinite_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter whose gradient holds NaN or infinity; None if there is none. Waits for the device once."""
    found = [(name, p.grad) for name, p in unwrap(model).named_parameters() if p.grad is not None and p.grad.numel()]
    if not found:
        return None
    # an element that is not finite makes the norm so; a norm that only overflows costs a closer look
    norms = torch._foreach_norm([gradient for _, gradient in found])
    alike = len({(norm.device, norm.dtype) for norm in norms}) == 1
    if bool(torch.stack(norms if alike else [norm.to(norms[0].device, torch.float64) for norm in norms]).isfinite().all()):
        return None
    return next((name for name, gradient in found if not bool(gradient.isfinite().all())), None)
