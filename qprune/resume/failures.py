"""What the errors of a training loop tell: where the last good state is, which batch it was, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from qprune.errors import CheckpointError, NonFiniteError, OutOfMemoryError, QPruneError
from qprune.files import write_atomically
from qprune.options import OptionError, RunOptions
from qprune.ranks import RankError, is_lost, lost
from qprune.resume.phase import Phase

REPLAY = "nonfinite.safetensors"


@contextmanager
def explained(phase: Phase, options: RunOptions, seed: int) -> Iterator[None]:
    """Within, a NonFiniteError gets the file with its batch and the last good checkpoint into its message, and memory that does not suffice
    becomes an OutOfMemoryError that names the options to change. Another rank that is gone becomes a RankError,
    whatever a checkpoint leads to in the first step after it a CheckpointError."""
    try:
        yield
    except RankError:
        raise
    except NonFiniteError as error:
        where = _replay(error, phase, seed)
        error.args = (f"{error}{where}{phase.last_good()}",)
        raise
    except (RuntimeError, MemoryError) as error:
        if "deterministic implementation" in str(error):
            raise OptionError(f"deterministic: phase {phase.name}: {' '.join(str(error).split())}") from error
        if not phase.ranks.alone and is_lost(error):
            found = lost(error, f"phase {phase.name}: ")
            raise RankError(f"{found}{phase.last_good()}") from error
        if not _is_memory(error):
            if phase.tried or isinstance(error, QPruneError):
                raise
            raise phase.unfit(error) from error
        what = " ".join(str(error).split())[:200] or "no memory left"
        raise OutOfMemoryError(f"phase {phase.name}: out of memory ({what}); {advice(phase.name, options)}{phase.last_good()}") from error
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError) as error:
        if phase.tried or isinstance(error, QPruneError):
            raise
        raise phase.unfit(error) from error


def _replay(error: NonFiniteError, phase: Phase, seed: int) -> str:
    """Write the batch, and where it came; returns the words for it."""
    if error.batch is None:
        return ""
    place = {"phase": phase.name, "seed": seed, "epoch": len(phase.loop.history), "batch": error.index, "step": error.step}
    place |= {"layer": error.layer, "gradient": error.gradient, "loss": error.loss}
    path: Path = phase.folder / REPLAY
    x, y = error.batch
    words = f"; batch {error.index} of epoch {place['epoch']}, phase {phase.name}"
    if error.rank not in (None, phase.ranks.rank):
        return words
    if error.rank is None and not phase.ranks.main:
        return words
    try:
        tensors = {"x": x.detach().cpu().contiguous().clone(), "y": y.detach().cpu().contiguous().clone()}
        write_atomically(path, to_bytes(tensors, {name: str(value) for name, value in place.items()}))
    except CheckpointError:
        return words  # the error of the training counts
    return f"{words}, is kept in {path}"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(phase: str, options: RunOptions) -> str:
    """The options that take less memory."""
    less = []
    if options.accumulate < options.batch_size and not options.cuda_graph:
        less.append(f"split batches into more parts (--accumulate {min(2 * options.accumulate, options.batch_size)})")
    less.append(f"take a smaller batch (--batch-size {max(options.batch_size // 2, 1)})")
    if phase == "search":
        if options.method in ("edmips", "darts") and options.pairs:
            less.append(
                "choose weight and activation bits apart (--w-bits and --a-bits, the shared form, in place of --pairs, the joint one)"
            )
        elif options.method in ("zur", "slimmable"):
            less.append("evaluate fewer configurations at once (--set samples=4)")
        elif options.method in ("edmips", "darts"):
            less.append("give fewer candidates (--w-bits, --a-bits)")
    return ", or ".join(less)
