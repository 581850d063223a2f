"""The second embedded data set, which nothing is pretrained on."""

from collections import Counter

import numpy as np
import pytest

from vlprune.data import load_pairs, load_questions, scenes
from vlprune.data.landscapes import LANDSCAPES, SPLITS, STARTS
from vlprune.data.landscapes.look import DRAWINGS, box_of, pixels
from vlprune.data.landscapes.view import ABOVE, PLACES, VERBS, Landscape, Thing, landscape
from vlprune.data.landscapes.words import KINDS, captions, questions

SOME = [landscape(seed) for seed in range(400)]


def thing(kind, color="", pattern="", side="middle", depth="near"):
    return Thing(kind, color, pattern, side, depth, (0.0, 0.0))


def test_landscapes_are_the_same_every_time():
    for seed in (0, 7, 500_003):
        first, again = landscape(seed), landscape(seed)
        assert first == again
        np.testing.assert_array_equal(pixels(first), pixels(again))
        assert (captions(first), questions(first)) == (captions(again), questions(again))


def test_no_two_splits_share_a_landscape(monkeypatch):
    for split in SPLITS:
        monkeypatch.setitem(SPLITS, split, 60)
    seen = Counter()
    for split in SPLITS:
        for picture in LANDSCAPES.pictures(split):
            seen[picture.captions[0], tuple(q.text for q in picture.questions), picture.pixels.tobytes()] += 1
    assert len(seen) == 180
    assert set(seen.values()) == {1}
    assert STARTS.keys() == SPLITS.keys()
    with pytest.raises(ValueError, match="unknown split 'dev' of landscapes; there are: test, val, train"):
        list(LANDSCAPES.pictures("dev"))


def test_every_kind_has_a_drawing_and_a_verb():
    kinds = {*KINDS, *(kind for above in ABOVE.values() for kind in above)}
    assert kinds == DRAWINGS.keys() == VERBS.keys()
    assert kinds == {t.kind for view in SOME for t in (*view.ground, *view.sky)}


def test_texts_agree_with_the_view():
    for view in SOME:
        said = captions(view)
        assert len(said) == 5
        assert all(t.phrase in said[0] for t in view.ground)
        assert all(t.phrase in said[1] for t in view.sky)
        asked = questions(view)
        assert len({question.text for question in asked}) == 5
        for question in asked:
            assert Counter(question.answers).most_common(1)[0][0] == question.answer
            everything = (*view.ground, *view.sky)
            word = question.text.removesuffix("?").split()
            match question.kind:
                case "time":
                    assert question.answer == view.time
                case "place":
                    assert question.answer == view.place
                case "presence":
                    assert (question.answer == "yes") == any(t.kind == word[-2] for t in everything)
                case "color" | "pattern" | "side":
                    [own] = [t for t in everything if t.kind in word]
                    assert question.answer == getattr(own, question.kind)
                case "closest":
                    assert [t.kind for t in view.ground if t.depth == "near"] == [question.answer]
                case "order":
                    places = [[t.kind for t in view.ground].index(word[n]) for n in (4, 7)]
                    assert question.answer == ("yes" if places[0] < places[1] else "no")


def test_questions_begin_otherwise_than_those_about_the_scenes():
    ours = {question.text for view in SOME for question in questions(view)}
    theirs = {text for seed in range(400) for text, *_ in scenes.questions(scenes.scene(seed))}
    assert not ours & theirs
    starts = [{" ".join(text.split()[:2]) for text in texts} for texts in (ours, theirs)]
    assert not starts[0] & starts[1]


@pytest.mark.parametrize("kind", DRAWINGS)
def test_boxes_hold_what_is_drawn(kind):
    """A thing changes the picture inside its box, a pixel of blur apart, and nowhere else."""
    in_sky = any(kind in above for above in ABOVE.values())
    own = thing(kind, "red", "plain", depth="" if in_sky else "near")
    place = next((name for name, (_, kinds) in PLACES.items() if kind in kinds), "meadow")
    empty = Landscape("day", place, (), (), 3)
    full = Landscape("day", place, () if in_sky else (own,), (own,) if in_sky else (), 3)
    changed = np.abs(pixels(full).astype(int) - pixels(empty)).sum(2) > 0
    rows, columns = np.where(changed)
    x, y, w, h = box_of(own)
    assert changed.sum() > 15
    assert x - 1 <= columns.min() <= columns.max() <= x + w + 1
    assert y - 1 <= rows.min() <= rows.max() <= y + h + 2


def test_landscapes_are_a_data_set_by_name(monkeypatch, tmp_path):
    for split in SPLITS:
        monkeypatch.setitem(SPLITS, split, 12)
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path))
    pairs, asked = load_pairs("landscapes", "test"), load_questions("landscapes", "val")
    assert pairs[0]["image"].size == (64, 64)
    assert len(pairs) == 12
    assert pairs[0]["captions"] == captions(landscape(STARTS["test"]))
    assert len(asked) == 60
    assert all(region["box"][2] > 0 for region in pairs[0]["regions"])
