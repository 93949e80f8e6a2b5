"""Files in the format of CIFAR's binary versions, with a few records of random pixels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

NAMES10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def records(count: int, classes: tuple[int, ...], seed: int) -> np.ndarray:
    """[count, labels + 3072] bytes; every class occurs as often as every other, up to one."""
    generator = np.random.default_rng(seed)
    labels = [generator.permutation(np.arange(count) % n).astype(np.uint8) for n in classes]
    return np.concatenate([np.stack(labels, 1), generator.integers(0, 256, (count, 3072), dtype=np.uint8)], 1)


def contents10(count: int = 20) -> dict[str, bytes]:
    return {name: records(count, (10,), seed).tobytes() for seed, name in enumerate(NAMES10)}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


def archive(path: Path, contents: dict[str, bytes], folder: str, extra: list[tuple[tarfile.TarInfo, bytes]] | None = None) -> Path:
    """A .tar.gz of folder/name members, behind the extra ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for info, content in extra or []:
            tar.addfile(info, io.BytesIO(content))
        for name, content in contents.items():
            tar.addfile(member(f"{folder}/{name}", len(content)), io.BytesIO(content))
    return path
