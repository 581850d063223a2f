"""Boxes with phrases, as the lists of X-VLM have them."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from vlprune.data.annotations import fields, list_items, text, texts

Region = dict[str, Any]
LARGEST = 2**31  # of the numbers of a box, in pixels


def regions_of(where: str, item: Any) -> list[Region]:
    """The regions {box, phrase} that an item lists under `elems`, each as {bb, caption, possibly attributes}.

    A box is [x, y, width, height] in pixels. A phrase is the first caption behind the first attribute, where X-VLM
    (arXiv:2111.08276) draws one of each anew in every epoch.
    """
    (elements,) = fields(where, item, {"elems": list})
    found = []
    for j, element in enumerate(elements):
        place = f"{where}, element {j}"
        box, phrase = fields(place, element, {"bb": list, "caption": str | list})
        if isinstance(phrase, list):
            phrase = phrase[0] if phrase else ""
        words = text(place, {"caption": phrase}, "caption")
        if element.get("attributes"):
            words = f"{texts(place, element, 'attributes')[0]} {words}"
        found.append({"box": box_of(place, box), "phrase": words})
    return found


def box_of(where: str, box: Any) -> list[float]:
    """A box as four numbers of pixels, [x, y, width, height].

    Raises:
        ValueError: anything else, or a width or height that is not above 0.
    """
    numbers = isinstance(box, list) and all(
        isinstance(e, int | float) and not isinstance(e, bool) and abs(e) < LARGEST for e in box
    )
    if not numbers or len(box) != 4 or min(box[2:]) <= 0:
        wanted = "4 numbers, x, y, and a width and height above 0"
        raise ValueError(f"{where}: bb must be {wanted}, got {reprlib.repr(box)}")
    return [float(edge) for edge in box]


def read_regions(path: Path) -> dict[str, list[Region]]:
    """{file name: regions} of a list of {image, elems}; empty without the file."""
    found: dict[str, list[Region]] = {}
    if path.is_file():
        for where, item in list_items(path):
            (name,) = fields(where, item, {"image": str})
            found.setdefault(Path(name).name, []).extend(regions_of(where, item))
    return found
