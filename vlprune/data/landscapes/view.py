"""What a landscape shows: a place, a time of day, one to three things on the ground, up to two in the sky."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VERSION = 1
TIMES = {"day": "by day", "sunset": "at sunset", "night": "at night"}
# {place: (where something stands there, what stands there)}
PLACES = {
    "meadow": ("on a meadow", ("house", "tree", "car", "flower", "tent")),
    "desert": ("in the desert", ("cactus", "rock", "tent", "car")),
    "snow": ("in the snow", ("pine", "snowman", "house", "tent")),
    "lake": ("on a lake", ("boat", "duck", "rock")),
}
VERBS = {
    **{"house": "stands", "tree": "grows", "car": "is parked", "flower": "blooms", "tent": "is pitched"},
    **{"cactus": "grows", "rock": "lies", "pine": "grows", "snowman": "stands", "boat": "sails", "duck": "swims"},
    **{"sun": "shines", "moon": "shines", "cloud": "drifts", "bird": "flies", "balloon": "rises"},
}
COLORS = {
    "red": (178, 44, 48),
    "blue": (64, 104, 188),
    "yellow": (232, 196, 70),
    "purple": (124, 76, 150),
    "orange": (226, 126, 48),
    "pink": (232, 150, 170),
}
COLORED = ("house", "car", "flower", "tent", "boat", "balloon")
PATTERNS = ("plain", "striped", "dotted")
PATTERNED = ("tent", "boat", "balloon")
SIDES = ("left", "middle", "right")
DEPTHS = ("near", "far")
ABOVE = {"day": ("sun", "cloud", "bird", "balloon"), "sunset": ("sun", "cloud", "bird", "balloon")} | {
    "night": ("moon", "cloud", "balloon")
}


@dataclass(frozen=True)
class Thing:
    """Something that stands on the ground or is in the sky.

    Attributes:
        kind: what it is, such as "tent".
        color: its colour; "" for what has its own.
        pattern: its pattern; "" for what has none.
        side: where it is, of SIDES.
        depth: how far away it is, of DEPTHS; "" in the sky.
        offset: (x, y) in pixels from the middle of its place.
    """

    kind: str
    color: str
    pattern: str
    side: str
    depth: str
    offset: tuple[float, float]

    @property
    def phrase(self) -> str:
        """Pattern, colour and kind in words; plain is not said."""
        return " ".join(w for w in (self.pattern.replace("plain", ""), self.color, self.kind) if w)

    @property
    def a(self) -> str:
        """The phrase with its article; there is one sun and one moon."""
        if self.kind in ("sun", "moon"):
            return f"the {self.phrase}"
        return f"{'an' if self.phrase[0] in 'aeiou' else 'a'} {self.phrase}"

    @property
    def where(self) -> str:
        """Its side in words, such as "on the left"."""
        return "in the middle" if self.side == "middle" else f"on the {self.side}"

    @property
    def look(self) -> tuple:
        """What a viewer sees of it, but for small offsets."""
        return self.kind, self.color, self.pattern, self.side, self.depth


@dataclass(frozen=True)
class Landscape:
    """A view, and the seed of its remaining randomness; things on the ground from left to right, then the sky."""

    time: str
    place: str
    ground: tuple[Thing, ...]
    sky: tuple[Thing, ...]
    seed: int

    @property
    def signature(self) -> tuple:
        """What makes two landscapes the same to a viewer."""
        return self.time, self.place, *(t.look for t in (*self.ground, *self.sky))


def landscape(seed: int) -> Landscape:
    """The landscape of a seed."""
    rng = np.random.default_rng([VERSION, 7, seed])
    time, place = str(rng.choice(list(TIMES))), str(rng.choice(list(PLACES)))
    ground = _things(rng, PLACES[place][1], int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.3])), depth=True)
    sky = _things(rng, ABOVE[time], int(rng.choice([0, 1, 2], p=[0.15, 0.55, 0.3])), depth=False)
    # There is one sun and one moon.
    single = [t for n, t in enumerate(sky) if t.kind not in ("sun", "moon") or t.kind not in [o.kind for o in sky[:n]]]
    return Landscape(time, place, tuple(ground), tuple(single), seed)


def _things(rng: np.random.Generator, kinds: tuple[str, ...], count: int, *, depth: bool) -> list[Thing]:
    found = []
    for side in sorted(rng.choice(3, count, replace=False)):
        kind = str(rng.choice(kinds))
        found.append(
            Thing(
                kind=kind,
                color=str(rng.choice(list(COLORS))) if kind in COLORED else "",
                pattern=str(rng.choice(PATTERNS)) if kind in PATTERNED else "",
                side=SIDES[side],
                depth=str(rng.choice(DEPTHS)) if depth else "",
                offset=(float(rng.uniform(-3, 3)), float(rng.uniform(-2, 2))),
            )
        )
    return found
