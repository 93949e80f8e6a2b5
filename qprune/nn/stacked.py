"""S configurations of one batch evaluated together, and what a user's closure makes of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qprune.errors import InputError
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.stack import Choices, Stack
from qprune.nn.surgery import copy_model
from qprune.wrappers import unwrap

log = logging.getLogger("qprune")
STATISTICS: tuple[str, ...] = ("batch", "running")
_MOST = 16
_PIXELS = 1 << 17  # on two cores, resnet20 with more than 32 images of 32 x 32 times 4 configurations is no faster together
_PIXELS_ON_A_GPU = 1 << 24
_stackable: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def stacked_logits(model: nn.Module, choices: Choices, x: Any, statistics: str = "batch", together: int | None = None) -> Tensor:
    """What the model gives in S configurations, [S, N, classes], without gradients and with everything quantized (eval mode).

    choices     unit (name of its convolution) → candidate of every filter, [S, F] int64; units that are not named keep their gate's choice
    x           the model's argument
    statistics  "batch": every configuration is normalised by its own batch's statistics; "running": by those the model has
    together    configurations per pass at most; None: 16, or fewer where the batch fills the caches (or the memory of a GPU) by itself

    Before the first evaluation of a model two configurations together are compared with one at a time, in float64 and on a few samples. A
    network whose own code does not keep channels apart (a softmax over them, say) is evaluated in S passes, after one log line.
    """
    found: Tensor = _evaluate(model, choices, (x,), {}, statistics, together)
    return found


def losses(
    model: nn.Module,
    choices: Choices,
    closure: Callable[..., Tensor],
    batch: Sequence[Any] = (),
    statistics: str = "batch",
    together: int | None = None,
) -> Tensor:
    """closure(model, *batch) of S configurations, [S] float64, without gradients; arguments as for `stacked_logits`.

    The closure is called S times with a stand-in for the model, whose outputs come from one evaluation: it has to give the model the same
    inputs every time. Parts of the model that it calls are those of the configuration, each in a pass of its own.
    """
    replay = Replay(model, choices, statistics, together)
    found = []
    with torch.no_grad():
        for s in range(replay.size):
            with replay.turned_to(s):
                found.append(closure(replay, *batch).detach().double())
    return torch.stack(found)


class Replay:
    """A stand-in for the model: when it is called, it gives what the model gives in configuration s (see `turned_to`), evaluated for all S
    configurations at the first call. Several calls for one s are told apart by their order."""

    def __init__(self, model: nn.Module, choices: Choices, statistics: str = "batch", together: int | None = None) -> None:
        self.model, self.choices, self.statistics, self.together = model, choices, statistics, together
        self.size = _check(unwrap(model), choices, statistics)
        self._alone: Stack | None = None
        self._current = self._called = 0
        self._outputs: list[Any] = []

    @contextmanager
    def turned_to(self, s: int) -> Iterator[None]:
        """A `with` block in which configuration s is evaluated."""
        self._current, self._called = s, 0
        with Stack(unwrap(self.model), _part(self.choices, s, s + 1), self.statistics) as self._alone:
            yield
        self._alone = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called == len(self._outputs):
            with nullcontext() if self._alone is None else self._alone.suspended():
                self._outputs.append(_evaluate(self.model, self.choices, args, kwargs, self.statistics, self.together))
        output = self._outputs[self._called]
        self._called += 1
        return tree_map(lambda value: value[self._current] if isinstance(value, Tensor) else value, output)

    def train(self, mode: bool = True) -> Replay:
        """Nothing: evaluation does not depend on the model's mode."""
        return self

    eval = train

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _evaluate(
    model: nn.Module, choices: Choices, args: tuple[Any, ...], kwargs: Mapping[str, Any], statistics: str, together: int | None
) -> Any:
    inner = unwrap(model)
    size = _check(inner, choices, statistics)
    at_once = _at_once(args, kwargs) if together is None else together
    if at_once < 1:
        raise InputError(f"together: expected at least 1 configuration per pass, got {together}")
    if size > 1 and at_once > 1:
        if inner not in _stackable:
            _stackable[inner] = _agrees(inner, args, kwargs, statistics)
        at_once = at_once if _stackable[inner] else 1
    weights: dict[nn.Module, Tensor] = {}
    return _joined([_pass(inner, _part(choices, i, i + at_once), args, kwargs, statistics, weights) for i in range(0, size, at_once)])


def _at_once(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Configurations per pass, by the pixels of the batch."""
    x = next((value for value in tree_leaves((args, dict(kwargs))) if isinstance(value, Tensor) and value.dim() > 1), None)
    if x is None:
        return _MOST
    pixels = x.numel() // max(x.size(1), 1)
    return max(1, min(_MOST, (_PIXELS_ON_A_GPU if x.is_cuda else _PIXELS) // max(pixels, 1)))


def _pass(
    model: nn.Module,
    choices: Choices,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    statistics: str,
    weights: dict[nn.Module, Tensor] | None = None,
) -> Any:
    with torch.no_grad(), Stack(model, choices, statistics, weights) as stack:
        return tree_map(stack.split, model(*args, **kwargs))


def _part(choices: Choices, start: int, stop: int) -> dict[str, Tensor]:
    return {name: rows[start:stop] for name, rows in choices.items()}


def _check(model: nn.Module, choices: Choices, statistics: str) -> int:
    """S. Raises InputError for choices that do not fit."""
    if statistics not in STATISTICS:
        raise InputError(f"statistics: expected one of {', '.join(STATISTICS)}, got {statistics!r}")
    units = {name: module for name, module in model.named_modules() if isinstance(module, FilterConv2d)}
    sizes = {rows.size(0) if rows.dim() == 2 else 0 for rows in choices.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"choices: expected a tensor [S, F] for every unit, with one S, got {[tuple(c.shape) for c in choices.values()]}")
    for name, rows in choices.items():
        if name not in units:
            raise InputError(f"choices: {name!r} is no unit of this model (prepare it with placement='output')")
        if rows.size(1) != units[name].out_channels:
            raise InputError(f"choices: layer {name} has {units[name].out_channels} filters, got choices for {rows.size(1)}")
    return sizes.pop()


def _agrees(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], statistics: str) -> bool:
    """Whether two configurations together give what they give one by one. In float64, where rounding flips no quantized value."""
    random = torch.Generator().manual_seed(0)
    choices = {
        name: torch.randint(len(unit.candidates), (2, unit.out_channels), generator=random).to(unit.weight.device)
        for name, unit in model.named_modules()
        if isinstance(unit, FilterConv2d)
    }
    try:
        twin = copy_model(model).double()
        args, kwargs = _few_samples(args, kwargs)
        both = _pass(twin, choices, args, kwargs, statistics)
        each = [_pass(twin, _part(choices, s, s + 1), args, kwargs, statistics) for s in range(2)]
        agree: list[bool] = []
        tree_map(lambda a, b: agree.append(_close(a, b)), both, _joined(each))
        reason = "the results differ"
    except Exception as error:  # whatever an unknown network's own code makes of more channels than it expects
        agree, reason = [False], f"{type(error).__name__}: {error}".splitlines()[0]
    if not all(agree):
        log.info("qprune: this network cannot evaluate several configurations together (%s); it takes one pass for each", reason)
    return all(agree)


def _few_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """At most 4 samples of the arguments, in float64."""
    tensors = [value for value in tree_leaves((args, dict(kwargs))) if isinstance(value, Tensor) and value.dim()]
    batch = tensors[0].size(0) if tensors else 0

    def few(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[:4] if value.dim() and value.size(0) == batch else value
        return value.double() if value.is_floating_point() else value

    few_args, few_kwargs = tree_map(few, (args, dict(kwargs)))
    return few_args, few_kwargs


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs of several passes, configuration after configuration."""
    return tree_map(lambda *values: torch.cat(values) if isinstance(values[0], Tensor) else values[0], *parts)


def _close(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) or (a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4))
