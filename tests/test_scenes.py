"""The embedded data set."""

import numpy as np
import pytest

from vlprune.data import drawn, load_pairs, load_questions, scenes
from vlprune.data.source import find_source


def test_scenes_are_the_same_every_time_and_no_two_splits_share_one():
    first = scenes.scene(7)
    assert first == scenes.scene(7)
    np.testing.assert_array_equal(scenes.pixels(first), scenes.pixels(scenes.scene(7)))
    signatures = {split: {s.signature for s in scenes.split_scenes(split)} for split in scenes.SPLITS}
    for split, count in scenes.SPLITS.items():
        assert len(signatures[split]) == count
    assert not signatures["train"] & (signatures["val"] | signatures["test"])
    assert not signatures["val"] & signatures["test"]
    held_out = signatures["val"] | signatures["test"]
    assert not any(s.signature in held_out for i in range(3000) if (s := scenes.train_scene(i)))


def test_scene_captions_and_questions_agree_with_the_scene():
    for seed in range(200):
        s = scenes.scene(seed)
        captions, questions = scenes.captions(s), scenes.questions(s)
        assert len(captions) == 5
        assert all(t.phrase in captions[0] for t in s.things)
        assert len({q for q, _, _ in questions}) == len(questions) == scenes.QUESTIONS_PER_IMAGE
        for question, answer, kind in questions:
            if kind == "background":
                assert answer == s.background
            if question == "how many shapes are there?":
                assert answer == str(len(s.things))
            if kind == "side":
                thing = next(t for t in s.things if f" {t.color} {t.shape} " in question)
                assert answer in thing.place.split()


def test_scene_boxes_hold_what_is_drawn():
    s = scenes.Scene("black", (scenes.Thing("square", "red", "large", 1, 2, (41.0, 25.0)),), 3)
    red = scenes.pixels(s)[..., 0].astype(int) - scenes.pixels(s)[..., 1] > 100
    rows, columns = np.where(red)
    x, y, w, h = s.things[0].box
    assert x <= columns.min() <= columns.max() < x + w
    assert y <= rows.min() <= rows.max() < y + h


@pytest.mark.parametrize("kind", ["pairs", "questions"])
def test_scenes_come_with_the_common_columns(kind, scenes_cache):
    if kind == "pairs":
        data = load_pairs("scenes", "test")
        assert set(data.column_names) == {"image", "image_id", "captions", "regions"}
        assert len(data) == 300
        assert data[0]["image"].size == (64, 64)
        assert len(data[0]["captions"]) == 5
    else:
        data = load_questions("scenes", "test", limit=12)
        own = ("answers", "answer_type", "weight")
        assert set(data.column_names) == {"image", "image_id", "question", "question_id", *own}
        assert len(data) == 12
        assert len(data[0]["answers"]) == 10
        assert set(data["weight"]) == {1.0}


def test_generation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "pixels", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_pairs("scenes", "test")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_leftovers_of_a_killed_generation_go(tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(drawn, "write", lambda root, _: (root / "made").touch())
    root = tmp_path / f"scenes-{scenes.VERSION}"
    (tmp_path / f"{root.name}.part-abc" / "images").mkdir(parents=True)
    assert find_source("scenes").root == root
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [root]
