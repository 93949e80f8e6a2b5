"""The handwritten digits that scikit-learn carries (UCI optdigits, 1797 images of 8x8): a real problem with no download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .task import DataError, Split, Task, stratified


def digits(seed: int = 0, *, fractions: Sequence[float] = (0.6, 0.2, 0.2), image_size: int = 16) -> Task:
    """1x16x16 images in 10 classes, split by `seed` into train, val and test with the class proportions kept.

    The 8x8 images are resized bilinearly and scaled to mean 0 and deviation 1 over the training part. Training batches are shifted
    by up to 2 pixels and rotated by up to 12 degrees.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn, which is not installed: pip install scikit-learn") from error
    if len(fractions) != 3:
        raise DataError(f"fractions must be three numbers (train, val, test), got {tuple(fractions)}")
    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1)
    y = torch.from_numpy(raw.target).long()
    x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", align_corners=False)
    parts = stratified(y, fractions, seed)
    mean, std = x[parts[0]].mean(), x[parts[0]].std()
    background = float(-mean / std)
    x = (x - mean) / std
    train, val, test = (Split(x[part], y[part]) for part in parts)
    return Task("digits", 1, image_size, 10, train, val, test, partial(shift_rotate, background=background))


def shift_rotate(x: Tensor, generator: torch.Generator, *, background: float = 0.0, pixels: float = 2.0, degrees: float = 12.0) -> Tensor:
    """Every image shifted by up to `pixels` along each axis and rotated by up to `degrees`, uniformly, with bilinear resampling.

    x [N, C, H, W]; what comes in from outside is `background`, so the values stay between it and those of x. The random numbers come
    from `generator` (CPU) alone.
    """
    count, _, height, width = x.shape
    angle, right, down = (torch.rand(3, count, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(degrees)
    cos, sin = angle.cos(), angle.sin()
    # affine_grid works in coordinates from -1 to 1, so a pixel is 2 / width wide and 2 / height high.
    rows = [
        torch.stack([cos, -sin * height / width, right * pixels * 2 / width], 1),
        torch.stack([sin * width / height, cos, down * pixels * 2 / height], 1),
    ]
    matrix = torch.stack(rows, 1).to(x)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x - background, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + background
