"""`scenes`: one to four flat shapes on a 4 × 4 grid of cells, which the embedded models are pretrained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from vlprune.data.drawn import DrawnSet, Picture, Question, distinct, listing, ten_answers

VERSION = 1
SIZE = 64
CELL = 16
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (245, 220, 40),
    "orange": (255, 127, 14),
    "purple": (130, 60, 180),
    "cyan": (40, 200, 215),
    "pink": (245, 130, 190),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (22, 22, 22), "gray": (128, 128, 128), "brown": (95, 62, 40)}
RADII = {"small": 4.5, "large": 7.5}
NUMBERS = ("no", "one", "two", "three", "four")
SPLITS = {"train": 4000, "val": 200, "test": 300}
QUESTIONS_PER_IMAGE = 6


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; row and column in 0..3, center (x, y) in pixels."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    center: tuple[float, float]

    @property
    def phrase(self) -> str:
        """Size, colour and shape in words."""
        return f"{self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        """The quadrant of the picture that the thing is in, such as "top left"."""
        return f"{'top' if self.row < 2 else 'bottom'} {'left' if self.column < 2 else 'right'}"

    @property
    def box(self) -> list[float]:
        """[x, y, width, height] in pixels, inside the image."""
        r = RADII[self.size]
        x0, y0 = (max(0.0, c - r) for c in self.center)
        x1, y1 = (min(float(SIZE), c + r) for c in self.center)
        return [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]


@dataclass(frozen=True)
class Scene:
    """What an image shows, and the seed of its remaining randomness; things in reading order."""

    background: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def signature(self) -> tuple:
        """What makes two scenes the same to a viewer: everything but jitter and noise."""
        return (self.background, *((t.shape, t.color, t.size, t.row, t.column) for t in self.things))


def scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = np.random.default_rng([VERSION, seed])
    count = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.3, 0.35, 0.25]))
    things = []
    for cell in sorted(rng.choice(16, count, replace=False)):
        row, column = divmod(int(cell), 4)
        jitter = rng.uniform(-3, 3, 2)
        things.append(
            Thing(
                shape=str(rng.choice(SHAPES)),
                color=str(rng.choice(list(COLORS))),
                size=str(rng.choice(list(RADII))),
                row=row,
                column=column,
                center=(CELL * (column + 0.5) + float(jitter[0]), CELL * (row + 0.5) + float(jitter[1])),
            )
        )
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(things), seed)


# ---- the picture ----------------------------------------------------------------------------------------------------


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape at the origin, negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            return np.hypot(x, y) - r
        case "square":
            return np.maximum(ax, ay) - 0.88 * r
        case "triangle":
            return np.maximum(0.87 * ax - 0.5 * y, y) - 0.6 * r
        case "cross":
            arm = 0.34 * r
            return np.minimum(np.maximum(ax - arm, ay - r), np.maximum(ay - arm, ax - r))
        case "diamond":
            return (ax + ay - 1.15 * r) / np.sqrt(2)
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    raise ValueError(f"unknown shape {shape!r}; there are: {', '.join(SHAPES)}")


def pixels(scene: Scene) -> np.ndarray:
    """The image of a scene, (64, 64, 3) uint8."""
    rng = np.random.default_rng([VERSION, scene.seed, 1])
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        reach = int(RADII[thing.size]) + 3
        cx, cy = thing.center
        x0, y0 = (max(0, int(c) - reach) for c in (cx, cy))
        x1, y1 = (min(SIZE, int(c) + reach + 1) for c in (cx, cy))
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        alpha = np.clip(0.5 - _distance(thing.shape, x - cx, y - cy, RADII[thing.size]), 0, 1)[..., None]
        patch = image[y0:y1, x0:x1]
        patch += alpha * (np.array(COLORS[thing.color], np.float32) - patch)
    image *= rng.uniform(0.85, 1.1)
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


# ---- the words ------------------------------------------------------------------------------------------------------


def _plural(shape: str, count: int) -> str:
    return shape if count == 1 else f"{shape}es" if shape == "cross" else f"{shape}s"


def _relation(a: Thing, b: Thing) -> str | None:
    """How a lies to b by cells, the larger of the two offsets; None when both are equal."""
    dx, dy = a.column - b.column, a.row - b.row
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def captions(scene: Scene) -> list[str]:
    """Five captions, as five people would write them."""
    rng = np.random.default_rng([VERSION, scene.seed, 2])
    things, ground = scene.things, scene.background
    pick = lambda *options: str(rng.choice(options))  # noqa: E731
    everything = listing([f"a {t.phrase}" for t in things])
    places = listing([f"a {t.color} {t.shape} in the {t.place}" for t in things[:3]])
    counts = {s: sum(t.shape == s for t in things) for s in SHAPES}
    tally = listing([f"{NUMBERS[n]} {_plural(s, n)}" for s, n in counts.items() if n])
    colors = listing([f"{t.color} {t.shape}" for t in things])
    lines = [
        f"{everything} on a {ground} background",
        f"{pick('a picture of', 'there is', 'this shows')} {everything}",
        places,
        f"{tally} on {ground}, {'in' if len(things) == 1 else 'colored'} {listing([t.color for t in things])}",
    ]
    pairs = [(a, b, r) for a in things for b in things if a is not b and (r := _relation(a, b))]
    if pairs:
        a, b, relation = pairs[int(rng.integers(len(pairs)))]
        lines.append(f"the {a.phrase} is {relation} the {b.phrase}")
    else:
        lines.append(f"{pick('a', 'the')} {ground} {pick('picture', 'image')} with a {colors}")
    return lines


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Six (question, answer, type) of up to eight types, with unique answers."""
    rng = np.random.default_rng([VERSION, scene.seed, 3])
    things = scene.things
    any_of = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    unique_shape = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
    unique_color = [t for t in things if sum(o.color == t.color for o in things) == 1]
    unique_pair = [t for t in things if sum((o.color, o.shape) == (t.color, t.shape) for o in things) == 1]

    def exist() -> tuple[str, str] | None:
        t = any_of(things)
        shape, color = (t.shape, t.color) if rng.random() < 0.5 else (any_of(SHAPES), any_of(list(COLORS)))
        return f"is there a {color} {shape}", "yes" if any(
            (o.shape, o.color) == (shape, color) for o in things
        ) else "no"

    def relation() -> tuple[str, str] | None:
        pairs = [(a, b, r) for a in unique_pair for b in unique_pair if a is not b and (r := _relation(a, b))]
        if not pairs:
            return None
        a, b, true = any_of(pairs)
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        asked = true if rng.random() < 0.5 else opposite[true]
        return f"is the {a.color} {a.shape} {asked} the {b.color} {b.shape}", "yes" if asked == true else "no"

    def count() -> tuple[str, str] | None:
        if rng.random() < 0.3:
            return "how many shapes are there", str(len(things))
        shape = any_of(things).shape if rng.random() < 0.7 else any_of(SHAPES)
        return f"how many {_plural(shape, 2)} are there", str(sum(t.shape == shape for t in things))

    def color() -> tuple[str, str] | None:
        if not unique_shape:
            return None
        t = any_of(unique_shape)
        return f"what color is the {t.shape}", t.color

    def shape() -> tuple[str, str] | None:
        if not unique_color:
            return None
        t = any_of(unique_color)
        return f"what shape is the {t.color} thing", t.shape

    def size() -> tuple[str, str] | None:
        if not unique_pair:
            return None
        t = any_of(unique_pair)
        return f"is the {t.color} {t.shape} small or large", t.size

    def side() -> tuple[str, str] | None:
        if not unique_pair:
            return None
        t = any_of(unique_pair)
        if rng.random() < 0.5:
            return f"is the {t.color} {t.shape} at the top or bottom", "top" if t.row < 2 else "bottom"
        return f"is the {t.color} {t.shape} on the left or right", "left" if t.column < 2 else "right"

    def background() -> tuple[str, str] | None:
        return "what color is the background", scene.background

    makers = (exist, relation, count, color, shape, size, side, background)
    asked: dict[str, tuple[str, str, str]] = {}
    order = [makers[i] for i in rng.permutation(len(makers))]
    while len(asked) < QUESTIONS_PER_IMAGE:
        for maker in order:
            made = maker()
            if made and made[0] not in asked:
                asked[made[0]] = (f"{made[0]}?", made[1], maker.__name__)
            if len(asked) == QUESTIONS_PER_IMAGE:
                break
    return list(asked.values())


def picture(scene: Scene) -> Picture:
    """A scene as an image with its texts; people's answers are wrong with a chance of 5 % each."""
    groups = (("yes", "no"), tuple("01234"), tuple(COLORS), SHAPES, tuple(RADII), ("top", "bottom"), ("left", "right"))
    asked = []
    for i, (text, answer, kind) in enumerate(questions(scene)):
        rng = np.random.default_rng([VERSION, scene.seed, 4, i])
        asked.append(Question(text, ten_answers(rng, answer, (*groups, tuple(BACKGROUNDS))), answer, kind))
    return Picture(pixels(scene), captions(scene), asked, [(t.box, f"a {t.phrase}") for t in scene.things])


# ---- the splits -----------------------------------------------------------------------------------------------------

_TRAIN_SEED, _VAL_SEED, _TEST_SEED = 1_000_000, 500_000, 0


@cache
def _held_out() -> tuple[dict[str, list[int]], frozenset]:
    """Seeds of val and test, and the signatures of their scenes, which no other split may show."""
    seen: frozenset = frozenset()
    seeds: dict[str, list[int]] = {}
    for split, start in (("test", _TEST_SEED), ("val", _VAL_SEED)):
        seeds[split], seen = distinct(_signature, start, SPLITS[split], seen)
    return seeds, seen


def _signature(seed: int) -> tuple:
    return scene(seed).signature


def train_scene(index: int) -> Scene | None:
    """Training scene `index` of an endless sequence; None where val or test shows the same scene."""
    made = scene(_TRAIN_SEED + index)
    return None if made.signature in _held_out()[1] else made


def split_scenes(split: str) -> list[Scene]:
    """The scenes of a split; no scene is in two splits.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of scenes; there are: {', '.join(SPLITS)}")
    held, seen = _held_out()
    seeds = held[split] if split in held else distinct(_signature, _TRAIN_SEED, SPLITS["train"], seen)[0]
    return [scene(seed) for seed in seeds]


def _pictures(split: str) -> Iterator[Picture]:
    return map(picture, split_scenes(split))


SCENES = DrawnSet("scenes", VERSION, tuple(SPLITS), _pictures)
