"""Float networks that many processes start from: one file per seed, trained by the first process that needs it."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from qprune.checkpoint import load, save
from qprune.errors import CheckpointError


def trained_once(path: Path, build: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> tuple[nn.Module, str]:
    """The network in the file `path` and a digest of its tensors. Where there is no file, `train` makes the network, and others that call
    this meanwhile wait. build: a network of the same layers."""
    with _locked(path.parent / f".{path.stem}.lock"):
        if not path.exists():
            save(train(), path)
    net = load(path, build)
    return net, _digest(net)


def _digest(net: nn.Module) -> str:
    """Of all tensors, by name; equal for equal networks (a safetensors file's header is not)."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
