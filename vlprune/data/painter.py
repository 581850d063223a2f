"""Painting simple shapes, smoothly, on an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

FINE = 4  # samples of a pixel along each side
Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
Point = tuple[float, float]


class Painter:
    """Paints a thing on an image, in its own coordinates: x from its middle, y upwards from its foot, 1 its height."""

    def __init__(self, image: np.ndarray, middle: float, foot: float, height: float):
        """A painter on an image, which it changes.

        Args:
            image: (side, side, 3) float32, 0-255.
            middle: x of the thing's middle in pixels.
            foot: y of its foot in pixels.
            height: its height in pixels.
        """
        self.image, self.middle, self.foot, self.height = image, middle, foot, height

    def box(
        self, corners: tuple[float, float, float, float], color: Sequence[float] | np.ndarray, light: float
    ) -> None:
        """A rectangle (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = corners
        self._paint((x0, y0, x1, y1), lambda x, y: (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1), color, light, "plain")

    def triangle(
        self, a: Point, b: Point, c: Point, color: Sequence[float] | np.ndarray, light: float, pattern: str = "plain"
    ) -> None:
        """A triangle of three corners."""
        corners = (a, b, c)

        def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            sides = [
                (x - p[0]) * (q[1] - p[1]) - (y - p[1]) * (q[0] - p[0])
                for p, q in zip(corners, (*corners[1:], corners[0]), strict=True)
            ]
            return np.all([s >= 0 for s in sides], 0) | np.all([s <= 0 for s in sides], 0)

        xs, ys = zip(*corners, strict=True)
        self._paint((min(xs), min(ys), max(xs), max(ys)), inside, color, light, pattern)

    def ellipse(
        self,
        center: Point,
        radii: Point,
        color: Sequence[float] | np.ndarray,
        light: float,
        pattern: str = "plain",
        without: tuple[Point, Point] | None = None,
    ) -> None:
        """An ellipse, without the part that is in another one of (center, radii)."""

        def within(x: np.ndarray, y: np.ndarray, c: Point, r: Point) -> np.ndarray:
            return ((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 <= 1

        def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            own = within(x, y, center, radii)
            return own if without is None else own & ~within(x, y, *without)

        (x, y), (rx, ry) = center, radii
        self._paint((x - rx, y - ry, x + rx, y + ry), inside, color, light, pattern)

    def _paint(
        self,
        bounds: tuple[float, float, float, float],
        inside: Inside,
        color: Sequence[float] | np.ndarray,
        light: float,
        pattern: str,
    ) -> None:
        """Blends a colour into pixels, each by the share of its samples that are inside; stripes and dots are pale."""
        side = len(self.image)
        left, right = (self.middle + self.height * x for x in (bounds[0], bounds[2]))
        top, bottom = (self.foot - self.height * y for y in (bounds[3], bounds[1]))
        x0, x1 = max(0, int(np.floor(left))), min(side, int(np.ceil(right)) + 1)
        y0, y1 = max(0, int(np.floor(top))), min(side, int(np.ceil(bottom)) + 1)
        if x0 >= x1 or y0 >= y1:
            return
        steps = (np.arange(FINE) + 0.5) / FINE
        across = (np.arange(x0, x1)[:, None] + steps).ravel()
        down = (np.arange(y0, y1)[:, None] + steps).ravel()
        x, y = np.meshgrid((across - self.middle) / self.height, (self.foot - down) / self.height)
        share = _mean(inside(x, y).astype(np.float32))
        paint = np.asarray(color, np.float32) * light
        colors = np.broadcast_to(paint, (*share.shape, 3))
        if pattern != "plain":
            pale = _mean(_pale(pattern, across, down).astype(np.float32))[..., None]
            colors = paint + pale * (np.float32(245 * light) - paint)
        patch = self.image[y0:y1, x0:x1]
        patch += share[..., None] * (colors - patch)


def _pale(pattern: str, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Which samples of a pattern are pale."""
    if pattern == "striped":
        return np.broadcast_to(across % 4 < 2, (len(down), len(across)))
    return (across % 4 - 2) ** 2 + (down[:, None] % 4 - 2) ** 2 < 1.6


def _mean(samples: np.ndarray) -> np.ndarray:
    """The means of the samples of each pixel."""
    rows, columns = samples.shape
    return samples.reshape(rows // FINE, FINE, columns // FINE, FINE).mean((1, 3))
