import json

import numpy as np
import pytest

from vlprune.data import calibration_batches, load_pairs, load_questions, scenes


class Regions:
    uses_regions = True


class Plain:
    uses_regions = False


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
        assert set(data.column_names) == {"image", "image_id", "question", "question_id", "answers"}
        assert len(data) == 12
        assert len(data[0]["answers"]) == 10


def test_generation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "pixels", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_pairs("scenes", "test")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_real_layouts_are_read(dataset):
    pairs = load_pairs(str(dataset), "train")
    assert len(pairs) == 12
    assert pairs[0]["captions"][0] == "a red circle number 1"
    assert pairs[0]["regions"] == []
    questions = load_questions(str(dataset), "test")
    assert questions[0]["answers"] == ["yes"] * 10
    assert questions[0]["image"].size == (32, 32)


def _edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][2].pop("sentences"), r"dataset_small.json, images 2: lacks sentences"),
        (lambda d: d["images"][2].update(filename="gone.png"), r"images 2: there is no image .*gone.png"),
        (lambda d: d["images"][2].update(filename="../secret.png"), r"images 2: image path '../secret.png' leaves"),
        (lambda d: d["images"][2].update(sentences=[{"text": "x"}]), r"images 2, sentence 0: lacks raw; it has: text"),
        (lambda d: d.update(images=3), r"wanted an object with a list 'images'"),
    ],
)
def test_malformed_captions_are_named(dataset, change, message):
    _edit(dataset / "dataset_small.json", change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pairs(str(dataset), "train")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_questions.json", lambda d: d["questions"][0].pop("image_id"), r"questions 0: lacks image_id"),
        ("test_questions.json", lambda d: d["questions"][0].update(image_id=99), r"no image .* ends with 99"),
        ("test_annotations.json", lambda d: d["annotations"].pop(0), r"question 17 has no answers"),
        ("test_annotations.json", lambda d: d["annotations"][0].update(answers=["x"]), r"answer 0: wanted an object"),
    ],
)
def test_malformed_questions_are_named(dataset, file, change, message):
    _edit(dataset / file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_questions(str(dataset), "test")


def test_unreadable_files_are_named(dataset):
    with pytest.raises(ValueError, match=r"no images of split 'dev'; it has: test, train, val"):
        load_pairs(str(dataset), "dev")
    with pytest.raises(FileNotFoundError, match=r"wanted one \*dev\*questions.json .* there are: test_questions.json"):
        load_questions(str(dataset), "dev")
    with pytest.raises(ValueError, match=r"unknown data set 'coco'.*scenes"):
        load_pairs("coco", "train")
    picture = dataset / "images" / "0001.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read image .*0001.png"):
        load_pairs(str(dataset), "train")[0]
    (dataset / "dataset_small.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_small.json is no JSON"):
        load_pairs(str(dataset), "train")


def test_calibration_batches_repeat_and_go_on(dataset):
    def texts(first, n):
        batches = calibration_batches(str(dataset), Plain(), n_batches=n, batch_size=4, seed=5, first=first)
        return [list(batch.texts) for batch in batches]

    assert texts(0, 4) == texts(0, 4)
    assert texts(0, 4) == texts(0, 2) + texts(2, 2)
    epoch = [text for batch in texts(0, 3) for text in batch]
    assert len({text.split()[-1] for text in epoch}) == 12
    with pytest.raises(ValueError, match="needs 64 training images"):
        calibration_batches(str(dataset), Plain(), n_batches=1, batch_size=64, seed=0)


def test_calibration_regions_are_fractions(scenes_cache):
    batch = next(iter(calibration_batches("scenes", Regions(), n_batches=1, batch_size=8, seed=0)))
    assert len(batch.regions) == 8
    for position, (x, y, w, h), phrase in batch.regions:
        assert 0 <= position < 8
        assert 0 <= x < x + w <= 1.0001
        assert 0 <= y < y + h <= 1.0001
        assert phrase.split()[-1] in scenes.SHAPES


def test_real_photos(shared):
    data = load_pairs(str(shared / "data" / "flickr8k_1k"), "test")
    assert len(data) == 125
    assert all(len(c) == 5 for c in data["captions"])
    assert len(load_questions(str(shared / "data" / "daquar"), "test")) == 4958
    assert load_questions(str(shared / "data" / "vqa2_73img"), "train")[0]["image"].mode == "RGB"
