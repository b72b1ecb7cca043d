"""LIBERO-plus's sensor noise: five filters of a picture, each in ten strengths, after those of ImageNet-C (arXiv 1903.12261).

Numbers as LIBERO-plus has them, for pictures of 256 px; widths grow with the picture. Motion blur is described as ImageMagick does
it, whose code LIBERO-plus calls; glass takes pixels from around without the order in which ImageNet-C's loop goes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SIZE = 256
MOTION = (5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20)  # length / 2, deviation, px
GAUSSIAN = range(1, 11)  # deviation, px
ZOOM = (10, 1), (15, 1), (20, 2), (25, 2), (30, 3), (35, 1), (40, 1), (45, 2), (50, 2), (55, 3)  # up to so many %, in steps of
FOG = (0.5, 3), (1, 2.8), (1.5, 2.5), (2, 2.2), (2.5, 2), (3, 1.8), (3.5, 1.6), (4, 1.5), (4.5, 1.4), (5, 1.3)  # amount, smoothness
GLASS = (  # deviation and reach in px, times
    (0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1, 2, 2), (1.1, 3, 2), (1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1),
)


def blur(x: np.ndarray, deviation: float) -> np.ndarray:
    return gaussian_filter(x, (deviation, deviation, 0), mode="nearest")


def motion_blur(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """One-sided, along a line within 45° of the horizontal."""
    scale, angle = len(x) / SIZE, np.radians(rng.uniform(-45, 45))
    i = np.arange(2 * np.ceil(MOTION[strength][0] * scale) + 1)
    weights = np.exp(-0.5 * (i / (MOTION[strength][1] * scale)) ** 2)
    dx, dy = (np.ceil(i * side - 0.5).astype(int) for side in (np.cos(angle), np.sin(angle)))
    H, W, pad = *x.shape[:2], len(i)
    wide = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    shifted = (weight * wide[pad + b : pad + b + H, pad + a : pad + a + W] for weight, a, b in zip(weights / weights.sum(), dx, dy))
    return sum(shifted).astype(np.float32)


def gaussian_blur(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    return blur(x, GAUSSIAN[strength] * len(x) / SIZE)


def zoom_blur(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of the picture and of enlargements of its middle."""
    most, step = ZOOM[strength]
    H, W = x.shape[:2]
    picture, total = Image.fromarray((255 * x).astype(np.uint8)), x.copy()
    factors = 1 + np.arange(0, most + 1, step) / 100
    for factor in factors:
        left, top = (W - W / factor) / 2, (H - H / factor) / 2
        total += np.asarray(picture.resize((W, H), Image.Resampling.BILINEAR, (left, top, W - left, H - top)), np.float32) / 255
    return total / (len(factors) + 1)


def plasma(decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloudy landscape (SIZE, SIZE) from 0 to 1 whose edges fit together: each finer grid is the mean of its four neighbours, and
    random by an amount that falls with decay²."""
    land, step, amount = np.zeros((SIZE, SIZE), np.float32), SIZE, 1.0
    while step > 1:
        half = step // 2
        corners = land[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        chance = amount * rng.uniform(-1, 1, (3, *corners.shape))
        land[half::step, half::step] = middles = (rows + np.roll(rows, -1, 1)) / 4 + chance[0]
        land[::step, half::step] = (corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)) / 4 + chance[1]
        land[half::step, ::step] = (rows + middles + np.roll(middles, 1, 1)) / 4 + chance[2]
        step, amount = half, amount / decay**2
    land -= land.min()
    return land / land.max()


def fog(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    much, decay = FOG[strength]
    land = Image.fromarray(plasma(decay, rng)).resize((x.shape[1], len(x)), Image.Resampling.BILINEAR)
    return (x + much * np.asarray(land)[..., None]) * x.max() / (x.max() + much)


def glass_blur(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    deviation, reach, times = GLASS[strength]
    scale, (H, W) = len(x) / SIZE, x.shape[:2]
    x = blur(x, deviation * scale)
    rows, columns = np.mgrid[:H, :W]
    for _ in range(times):
        dy, dx = np.rint(scale * rng.integers(-reach, reach, (2, H, W))).astype(int)
        x = x[np.clip(rows + dy, 0, H - 1), np.clip(columns + dx, 0, W - 1)]
    return blur(x, deviation * scale)


FILTERS: tuple[Callable[[np.ndarray, int, np.random.Generator], np.ndarray], ...] = (
    motion_blur, gaussian_blur, zoom_blur, fog, glass_blur,
)
"""(H, W, 3) float32 from 0 to 1, strength 0 to 9, random numbers → (H, W, 3)"""


def corrupt(picture: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """A picture (H, W, 3) uint8 as a bad sensor sees it. number: LIBERO-plus's, 1 to 50, ten strengths of each filter."""
    kind, strength = divmod(number - 1, 10)
    filtered = FILTERS[kind](picture.astype(np.float32) / 255, strength, rng)
    return (255 * np.clip(filtered, 0, 1)).astype(np.uint8)
