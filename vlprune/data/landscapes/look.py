"""How a landscape looks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlprune.data.landscapes.view import COLORS, SIDES, VERSION, Landscape, Thing
from vlprune.data.painter import Painter

SIZE = 64
_SKY = {"day": ((96, 160, 226), (206, 228, 244)), "sunset": ((120, 70, 130), (250, 170, 100))} | {
    "night": ((10, 14, 40), (44, 50, 92))
}
_GROUND = {"meadow": (92, 150, 62), "desert": (214, 180, 120), "snow": (232, 238, 246), "lake": (60, 120, 150)}
_LIGHT = {"day": 1.0, "sunset": 0.86, "night": 0.55}
HORIZON = 30


def _background(view: Landscape, rng: np.random.Generator) -> np.ndarray:
    """Sky and ground without things, (64, 64, 3) float32, 0-255."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    high, low = (np.array(color, np.float32) for color in _SKY[view.time])
    image = high + (low - high) * np.clip(y / HORIZON, 0, 1)[..., None]
    if view.time == "night":
        stars = rng.uniform(size=(SIZE, SIZE)) < 0.012
        image[stars & (y < HORIZON)] = 225
    noise = rng.normal(0, 1, (SIZE, SIZE)).astype(np.float32)
    texture = {
        "meadow": 12 * np.sin(2.1 * x + 4 * noise) * (np.sin(1.3 * y) > 0),
        "desert": 9 * np.sin(0.5 * y + 2 * np.sin(0.13 * x)),
        "snow": 5 * noise,
        "lake": 16 * np.sin(1.5 * y + 0.8 * np.sin(0.35 * x)),
    }[view.place]
    ground = (np.array(_GROUND[view.place], np.float32) + texture[..., None]) * _LIGHT[view.time]
    hills = HORIZON + 1.5 * np.sin(0.11 * x + rng.uniform(0, 6)) * (view.place != "lake")
    return np.where((y >= hills)[..., None], ground, image)


def place_of(thing: Thing) -> tuple[float, float, float]:
    """(x of its middle, y of its foot, height) of a thing, in pixels; of what is in the sky, y of its lower edge."""
    x = (12, 32, 52)[SIDES.index(thing.side)] + thing.offset[0]
    if not thing.depth:
        return x, 18 + thing.offset[1], 12
    near = thing.depth == "near"
    return x, (58 if near else 38) + thing.offset[1], 21 if near else 12


def box_of(thing: Thing) -> list[float]:
    """[x, y, width, height] of a thing in pixels, inside the image."""
    x, foot, height = place_of(thing)
    x0, x1, y0, y1 = (max(0.0, min(float(SIZE), v)) for v in (x - height / 2, x + height / 2, foot - height, foot))
    return [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]


def pixels(view: Landscape) -> np.ndarray:
    """The image of a landscape, (64, 64, 3) uint8."""
    rng = np.random.default_rng([VERSION, 7, view.seed, 1])
    image = _background(view, rng)
    for thing in sorted((*view.sky, *view.ground), key=lambda thing: place_of(thing)[1]):  # the nearest last
        painter = Painter(image, *place_of(thing))
        light = 1.0 if thing.kind in ("sun", "moon") else _LIGHT[view.time] ** 0.6
        DRAWINGS[thing.kind](painter, np.array(COLORS.get(thing.color, (0, 0, 0)), np.float32), thing.pattern, light)
    image += rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


Drawing = Callable[[Painter, np.ndarray, str, float], None]


def _house(p: Painter, color: np.ndarray, _pattern: str, light: float) -> None:
    p.box((-0.42, 0, 0.42, 0.58), color, light)
    p.triangle((-0.5, 0.55), (0.5, 0.55), (0, 1), (92, 58, 48), light)
    p.box((-0.1, 0, 0.12, 0.36), (60, 42, 34), light)
    p.box((0.2, 0.26, 0.34, 0.42), (250, 236, 170), 1)


def _tree(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.box((-0.08, 0, 0.08, 0.5), (104, 70, 42), light)
    p.ellipse((0, 0.68), (0.36, 0.33), (40, 104, 46), light)


def _pine(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.box((-0.06, 0, 0.06, 0.3), (90, 62, 44), light)
    for foot, half in ((0.18, 0.38), (0.42, 0.3), (0.66, 0.2)):
        p.triangle((-half, foot), (half, foot), (0, foot + 0.36), (28, 82, 62), light)


def _car(p: Painter, color: np.ndarray, _pattern: str, light: float) -> None:
    p.box((-0.5, 0.14, 0.5, 0.4), color, light)
    p.box((-0.28, 0.4, 0.26, 0.62), color, light)
    p.box((-0.2, 0.43, 0.18, 0.56), (196, 220, 232), light)
    for x in (-0.28, 0.28):
        p.ellipse((x, 0.13), (0.13, 0.13), (26, 26, 28), 1)


def _flower(p: Painter, color: np.ndarray, _pattern: str, light: float) -> None:
    p.box((-0.03, 0, 0.03, 0.6), (36, 110, 44), light)
    for turn in range(5):
        x, y = 0.17 * np.cos(1.2566 * turn), 0.17 * np.sin(1.2566 * turn)
        p.ellipse((float(x), 0.72 + float(y)), (0.14, 0.14), color, light)
    p.ellipse((0, 0.72), (0.1, 0.1), (250, 230, 120), light)


def _tent(p: Painter, color: np.ndarray, pattern: str, light: float) -> None:
    p.triangle((-0.5, 0), (0.5, 0), (0, 0.72), color, light, pattern)
    p.triangle((-0.12, 0), (0.12, 0), (0, 0.4), (48, 40, 36), light)


def _cactus(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    green = (46, 122, 74)
    p.box((-0.09, 0, 0.09, 0.9), green, light)
    for x in (-1, 1):
        p.box((min(0, 0.3 * x), 0.36, max(0, 0.3 * x), 0.46), green, light)
        p.box((0.3 * x - 0.06, 0.36, 0.3 * x + 0.06, 0.68), green, light)


def _rock(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.ellipse((0, 0.24), (0.46, 0.26), (112, 108, 104), light)
    p.ellipse((-0.1, 0.3), (0.24, 0.13), (142, 138, 134), light)


def _snowman(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    for y, r in ((0.24, 0.26), (0.64, 0.19)):
        p.ellipse((0, y), (r + 0.03, r + 0.03), (120, 136, 160), light)
        p.ellipse((0, y), (r, r), (250, 252, 255), light)
    p.box((-0.16, 0.8, 0.16, 0.98), (30, 30, 34), 1)
    p.box((0, 0.6, 0.16, 0.66), (236, 130, 40), light)


def _boat(p: Painter, color: np.ndarray, pattern: str, light: float) -> None:
    p.box((-0.5, 0, 0.5, 0.16), (96, 62, 44), light)
    p.box((-0.38, -0.08, 0.38, 0.02), (96, 62, 44), light)
    p.triangle((-0.34, 0.22), (0.42, 0.22), (-0.02, 1), color, light, pattern)


def _duck(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.ellipse((-0.06, 0.14), (0.34, 0.18), (244, 222, 90), light)
    p.ellipse((0.22, 0.42), (0.15, 0.15), (244, 222, 90), light)
    p.box((0.32, 0.36, 0.5, 0.44), (236, 130, 40), light)


def _sun(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.ellipse((0, 0.5), (0.46, 0.46), (255, 238, 170), light)
    p.ellipse((0, 0.5), (0.36, 0.36), (255, 214, 64), light)


def _moon(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.ellipse((0, 0.5), (0.4, 0.4), (236, 236, 216), light, without=((0.2, 0.6), (0.34, 0.34)))


def _cloud(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    for x, y, r in ((-0.3, 0.42, 0.2), (0, 0.52, 0.28), (0.3, 0.42, 0.2)):
        p.ellipse((x, y), (1.1 * r, r), (238, 240, 244), light)


def _bird(p: Painter, _color: np.ndarray, _pattern: str, light: float) -> None:
    p.triangle((-0.48, 0.72), (-0.06, 0.38), (0.02, 0.54), (40, 36, 44), light)
    p.triangle((0.48, 0.72), (0.06, 0.38), (-0.02, 0.54), (40, 36, 44), light)


def _balloon(p: Painter, color: np.ndarray, pattern: str, light: float) -> None:
    p.ellipse((0, 0.64), (0.36, 0.38), color, light, pattern)
    p.box((-0.1, 0.02, 0.1, 0.16), (110, 76, 48), light)
    for x in (-0.08, 0.06):
        p.box((x, 0.14, x + 0.03, 0.34), (110, 76, 48), light)


DRAWINGS: dict[str, Drawing] = {
    **{"house": _house, "tree": _tree, "pine": _pine, "car": _car, "flower": _flower, "tent": _tent},
    **{"cactus": _cactus, "rock": _rock, "snowman": _snowman, "boat": _boat, "duck": _duck},
    **{"sun": _sun, "moon": _moon, "cloud": _cloud, "bird": _bird, "balloon": _balloon},
}
