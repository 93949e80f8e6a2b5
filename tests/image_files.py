"""Folders of small images, some of which cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHADES = {"ash": 40, "birch": 120, "cedar": 200}


def picture(path: Path, shade: int, seed: int = 0, shape: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    """An image whose mean tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-10, 11, (*shape, 3))
    Image.fromarray((shade + noise).astype(np.uint8)).convert(mode).save(path)


def tree(root: Path, **counts: int) -> Path:
    """root/part/class/number.png; part "all" is the root itself."""
    for part, count in counts.items():
        for name, shade in SHADES.items():
            for number in range(count):
                picture((root if part == "all" else root / part) / name / f"{number}.png", shade, number)
    return root


def damage(root: Path) -> dict[str, bytes]:
    """Files that cannot be read, by name."""
    whole = (root / "train" / "ash" / "0.png").read_bytes()
    found = {
        "train/ash/1.png": whole[: len(whole) // 2],
        "train/birch/2.png": b"",
        "train/cedar/3.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "train/cedar/4.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    }
    for name, content in found.items():
        (root / name).write_bytes(content)
    return found
