"""What people say of a landscape, and what they are asked about it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlprune.data.drawn import Question, listing, ten_answers
from vlprune.data.landscapes.view import (
    ABOVE,
    COLORS,
    PATTERNS,
    PLACES,
    TIMES,
    VERBS,
    VERSION,
    Landscape,
    Thing,
)

QUESTIONS_PER_IMAGE = 5
NUMBERS = ("no", "one", "two", "three")
KINDS = tuple(dict.fromkeys(kind for _, kinds in PLACES.values() for kind in kinds))
GROUPS = (("yes", "no"), tuple("0123"), tuple(TIMES), tuple(PLACES), tuple(COLORS), PATTERNS, KINDS, tuple(VERBS))


def captions(view: Landscape) -> list[str]:
    """Five captions, as five people would write them."""
    rng = np.random.default_rng([VERSION, 7, view.seed, 2])
    where, when = PLACES[view.place][0], TIMES[view.time]
    seen = listing([thing.a for thing in view.ground])
    above = listing([thing.a for thing in view.sky]) if view.sky else "nothing"
    first = view.ground[int(rng.integers(len(view.ground)))]
    kinds = {kind: sum(thing.kind == kind for thing in view.ground) for kind in KINDS}
    tally = listing([f"{NUMBERS[n]} {kind if n == 1 else _plural(kind)}" for kind, n in kinds.items() if n])
    over = f"an empty sky over the {view.place} {when}"
    if view.sky:
        one = view.sky[int(rng.integers(len(view.sky)))]
        over = f"{when} {one.a} {VERBS[one.kind]} over the {view.place}"
    return [
        f"{seen} {where} {when}",
        f"{_one(rng, 'a view of', 'we can see', 'look at')} {seen} with {above} above",
        f"{first.a} {VERBS[first.kind]} {_distance(first)} {first.where}",
        f"{tally} {where}",
        over,
    ]


def questions(view: Landscape) -> list[Question]:
    """Five questions of up to ten types, with unique answers; people err in 5 % of their ten answers."""
    rng = np.random.default_rng([VERSION, 7, view.seed, 3])
    ground, everything = view.ground, (*view.ground, *view.sky)
    once = [thing for thing in everything if sum(other.kind == thing.kind for other in everything) == 1]
    lone = [thing for thing in ground if thing in once]
    colored = [thing for thing in once if thing.color]
    patterned = [thing for thing in once if thing.pattern]
    makers: dict[str, Callable[[], tuple[str, str] | None]] = {
        "time": lambda: ("what time is it", view.time),
        "place": lambda: ("which kind of place do we see", view.place),
        "sky": lambda: ("what is up in the sky", view.sky[0].kind) if len(view.sky) == 1 else None,
        "closest": lambda: _closest(ground),
        "color": lambda: _of(rng, colored, lambda t: (f"which color does the {t.kind} have", t.color)),
        "pattern": lambda: _of(
            rng, patterned, lambda t: (f"does the {t.kind} look plain, striped or dotted", t.pattern)
        ),
        "count": lambda: _count(rng, view),
        "presence": lambda: _presence(rng, view),
        "order": lambda: _order(rng, lone),
        "side": lambda: _of(rng, lone, lambda t: (f"on which side do we find the {t.kind}", t.side)),
    }
    found: dict[str, tuple[str, str, str]] = {}
    order = [list(makers)[i] for i in rng.permutation(len(makers))]
    while len(found) < QUESTIONS_PER_IMAGE:
        for kind in order:
            made = makers[kind]()
            if made and made[0] not in found and len(found) < QUESTIONS_PER_IMAGE:
                found[made[0]] = (f"{made[0]}?", made[1], kind)
    return [
        Question(text, ten_answers(np.random.default_rng([VERSION, 7, view.seed, 4, i]), answer, GROUPS), answer, kind)
        for i, (text, answer, kind) in enumerate(found.values())
    ]


def _one(rng: np.random.Generator, *options: str) -> str:
    return str(rng.choice(options))


def _of(
    rng: np.random.Generator, things: list[Thing], ask: Callable[[Thing], tuple[str, str]]
) -> tuple[str, str] | None:
    """A question about one of the things; None if there is none."""
    return ask(things[int(rng.integers(len(things)))]) if things else None


def _plural(kind: str) -> str:
    return {"cactus": "cacti", "snowman": "snowmen"}.get(kind, f"{kind}s")


def _distance(thing: Thing) -> str:
    return "close by" if thing.depth == "near" else "far away"


def _closest(ground: tuple[Thing, ...]) -> tuple[str, str] | None:
    near = [thing for thing in ground if thing.depth == "near"]
    return ("what stands closest to us", near[0].kind) if len(near) == 1 and len(ground) > 1 else None


def _count(rng: np.random.Generator, view: Landscape) -> tuple[str, str]:
    if rng.random() < 0.3:
        return "what is the number of things on the ground", str(len(view.ground))
    there = view.ground[int(rng.integers(len(view.ground)))].kind
    kind = there if rng.random() < 0.7 else _one(rng, *PLACES[view.place][1])
    return f"what is the number of {_plural(kind)}", str(sum(thing.kind == kind for thing in view.ground))


def _presence(rng: np.random.Generator, view: Landscape) -> tuple[str, str]:
    things = (*view.ground, *view.sky)
    there = things[int(rng.integers(len(things)))].kind
    kind = there if rng.random() < 0.5 else _one(rng, *PLACES[view.place][1], *ABOVE[view.time])
    return f"can we see any {kind} here", "yes" if any(thing.kind == kind for thing in things) else "no"


def _order(rng: np.random.Generator, lone: list[Thing]) -> tuple[str, str] | None:
    """Whether one thing, of a kind that is there once, is further left than another."""
    if len(lone) < 2:
        return None
    first, second = sorted(rng.choice(len(lone), 2, replace=False))
    a, b, answer = (lone[first], lone[second], "yes") if rng.random() < 0.5 else (lone[second], lone[first], "no")
    return f"would we pass the {a.kind} before the {b.kind} from left to right", answer
