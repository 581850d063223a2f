import json

import pytest

from vlprune.data import calibration_batches, data_fingerprint, load_pairs, load_questions, scenes


class Regions:
    uses_regions = True


class Plain:
    uses_regions = False


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
        (lambda d: d["images"][2].update(sentences=None), r"images 2: sentences must be list, got None"),
        (lambda d: d["images"][2].update(sentences=[]), r"images 2: an image without captions"),
        (lambda d: d["images"][2].update(sentences=[{"raw": 5}]), r"images 2, sentence 0: raw must be str, got 5"),
        (
            lambda d: d["images"][2].update(sentences=[{"raw": " "}]),
            r"sentence 0: raw must be a text that is not empty",
        ),
        (lambda d: d["images"][2].update(filename=2), r"images 2: filename must be str, got 2"),
        (lambda d: d["images"][2].update(filepath=None), r"images 2: filepath must be str, got None"),
        (lambda d: d["images"][2].update(split=["train"]), r"images 2: split must be str, got \['train'\]"),
        (lambda d: d["images"][2].update(imgid=True), r"images 2: imgid must be int or str, got True"),
        (lambda d: d["images"][20].update(imgid="3"), r"images 20: image_id '3' is str, those before are int"),
        (lambda d: d["images"][20].update(imgid=3), r"images 20: image_id 3 occurs twice"),
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
        (
            "test_annotations.json",
            lambda d: d["annotations"][0].update(answers=None),
            r"answers must be list, got None",
        ),
        (
            "test_annotations.json",
            lambda d: d["annotations"][0]["answers"].clear(),
            r"at least one answer, got none",
        ),
        (
            "test_annotations.json",
            lambda d: d["annotations"][0]["answers"][3].update(answer=None),
            r"answer 3: answer must",
        ),
        (
            "test_annotations.json",
            lambda d: d["annotations"][1].update(question_id=17),
            r"1: question_id 17 occurs twice",
        ),
        (
            "test_questions.json",
            lambda d: d["questions"][1].update(question_id=17),
            r"questions 1: question_id 17 occurs",
        ),
        (
            "test_questions.json",
            lambda d: d["questions"][0].update(question=["x"]),
            r"question must be str, got \['x'\]",
        ),
        (
            "test_questions.json",
            lambda d: d["questions"][0].update(question=""),
            r"question must be a text that is not em",
        ),
        ("test_questions.json", lambda d: d["questions"][0].update(image_id="x17"), r"image_id must be a whole number"),
        (
            "test_questions.json",
            lambda d: d["questions"][0].update(image_id=None),
            r"image_id must be int or str, got N",
        ),
        ("test_questions.json", lambda d: d["questions"][0].update(split=3), r"questions 0: split must be str, got 3"),
    ],
)
def test_malformed_questions_are_named(dataset, file, change, message):
    _edit(dataset / file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_questions(str(dataset), "test")


def test_unreadable_files_are_named(dataset):
    with pytest.raises(ValueError, match=r"dataset_small.json has no split 'dev'; it has: test, train, val"):
        load_pairs(str(dataset), "dev")
    with pytest.raises(ValueError, match=r"\*questions.json of split 'dev'; it has: test, train, val \(test_"):
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


def test_pairs_are_named_by_cocoid_then_imgid_then_file(dataset):
    _edit(dataset / "dataset_small.json", lambda d: [i.update(cocoid=900 + i["imgid"]) for i in d["images"]])
    assert load_pairs(str(dataset), "test")["image_id"][0] == 917
    _edit(dataset / "dataset_small.json", lambda d: [(i.pop("cocoid"), i.pop("imgid")) for i in d["images"]])
    assert load_pairs(str(dataset), "test")["image_id"][0] == "0017.png"


def test_phrases_may_be_lists_and_boxes_are_read(dataset):
    elements = [{"bb": [1, 2, 3, 4.5], "caption": ["a dog", "a pet"]}, {"bb": [0, 0, 9, 9], "caption": "a cat"}]
    (dataset / "regions.json").write_text(json.dumps([{"image": "far/away/0001.png", "elems": elements}]))
    assert load_pairs(str(dataset), "train")[0]["regions"] == [
        {"box": [1.0, 2.0, 3.0, 4.5], "phrase": "a dog"},
        {"box": [0.0, 0.0, 9.0, 9.0], "phrase": "a cat"},
    ]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"image": "0001.png"}, r"regions.json: wanted a list, got dict"),
        ([{"image": 3, "elems": []}], r"regions.json, item 0: image must be str, got 3"),
        ([{"image": "0001.png", "elems": None}], r"item 0: elems must be list, got None"),
        ([[1, 2, 3]], r"element 0: bb must be 4 numbers, .* got \[1, 2, 3\]"),
        ([[1, 2, 3, "4"]], r"element 0: bb must be 4 numbers"),
        ([[1, 2, 3, True]], r"element 0: bb must be 4 numbers"),
        ([[1, 2, float("nan"), 4]], r"element 0: bb must be 4 numbers"),
        ([[1, 2, 0, 4]], r"element 0: bb must be 4 numbers, x, y, and a width and height above 0, got \[1, 2, 0, 4\]"),
        (["a box"], r"element 0: bb must be list, got 'a box'"),
        ([[1, 2, 3, 4], 5], r"element 0: caption must be str or list, got 5"),
        ([[1, 2, 3, 4], []], r"element 0: caption must be a text that is not empty, got ''"),
        ([[1, 2, 3, 4], [7, "x"]], r"element 0: caption must be str, got 7"),
    ],
)
def test_malformed_regions_are_named(dataset, regions, message):
    if isinstance(regions, list) and not isinstance(regions[0], dict):
        box, phrase = (*regions, "a dog")[:2]
        regions = [{"image": "0001.png", "elems": [{"bb": box, "caption": phrase}]}]
    (dataset / "regions.json").write_text(json.dumps(regions))
    with pytest.raises(ValueError, match=message):
        load_pairs(str(dataset), "train")


def _one_file(root, kind, key, with_split):
    """Puts the files of a kind together into one whose name has no split."""
    rows = []
    for split in ("train", "val", "test"):
        path = root / f"{split}_{kind}.json"
        rows += [row | ({"split": split} if with_split else {}) for row in json.loads(path.read_text())[key]]
        path.unlink()
    (root / f"{kind}.json").write_text(json.dumps({key: rows}))


def test_question_file_without_split_needs_it_in_every_question(dataset):
    _one_file(dataset, "questions", "questions", with_split=True)
    _one_file(dataset, "annotations", "annotations", with_split=False)
    ids = [load_questions(str(dataset), split)["question_id"][:] for split in ("train", "val", "test")]
    assert ids == [[*range(1, 13)], [*range(13, 17)], [*range(17, 23)]]
    _edit(dataset / "questions.json", lambda d: d["questions"][20].pop("split"))
    with pytest.raises(ValueError, match=r"/questions.json, questions 20: lacks split"):
        load_questions(str(dataset), "train")


def test_named_and_plain_question_files_do_not_mix(dataset):
    (dataset / "questions.json").write_text((dataset / "test_questions.json").read_text())
    with pytest.raises(ValueError, match=r": questions.json, test_questions.json, train_"):
        load_questions(str(dataset), "test")


def test_split_is_a_whole_word_of_the_file_name(dataset):
    (dataset / "train_questions.json").rename(dataset / "v2_OpenEnded_mscoco_train2014_questions.json")
    (dataset / "train_annotations.json").rename(dataset / "v2_mscoco_train2014_annotations.json")
    assert len(load_questions(str(dataset), "train")) == 12
    (dataset / "test_questions.json").rename(dataset / "OpenEnded_test2015_questions.json")
    assert len(load_questions(str(dataset), "test")) == 6
    (dataset / "OpenEnded_mscoco_test2015_questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of split 'test' .*: OpenEnded_mscoco_test2015_q\S+, OpenEnded_test2015_q"):
        load_questions(str(dataset), "test")


@pytest.mark.parametrize("name", ["retrieval_questions.json", "latest_questions.json", "train_val_questions.json"])
def test_file_name_without_one_split_counts_as_plain(dataset, name):
    _one_file(dataset, "questions", "questions", with_split=False)
    (dataset / "questions.json").rename(dataset / name)
    with pytest.raises(ValueError, match=rf"{name}, questions 0: lacks split"):
        load_questions(str(dataset), "val")


def test_images_are_found_by_the_number_of_image_files_alone(dataset):
    images = dataset / "images"
    (images / "batch17").mkdir()
    (images / "notes0017.txt").write_text("x")
    _edit(dataset / "test_questions.json", lambda d: d["questions"][0].update(image_id="17"))
    row = load_questions(str(dataset), "test")[0]
    assert row["image_id"] == 17
    assert row["image"].size == (32, 32)
    (images / "batch17" / "other_17.JPG").write_bytes((images / "0017.png").read_bytes())
    with pytest.raises(ValueError, match=r"questions 0: two images .* 17: .*/0017.png, .*/other_17.JPG"):
        load_questions(str(dataset), "test")
    assert len(load_questions(str(dataset), "train")) == 12


def test_fingerprint_follows_annotations_and_images(dataset):
    def changed():
        nonlocal before
        same, before = before == data_fingerprint(str(dataset)), data_fingerprint(str(dataset))
        return not same

    before = data_fingerprint(str(dataset))
    assert not changed()
    (dataset / "images" / "folder").mkdir()
    assert not changed()
    picture = dataset / "images" / "0003.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert changed()
    picture.write_bytes(b"x" * 10_000)
    assert changed()
    picture.write_bytes(b"x" * 9_999 + b"y")
    assert changed()
    picture.rename(picture.with_name("0099.png"))
    assert changed()
    _edit(dataset / "dataset_small.json", lambda d: d["images"].pop())
    assert changed()


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'scnes'.*'scenes'\?"):
        load_pairs("scnes", "train")


def test_real_photos(shared):
    data = load_pairs(str(shared / "data" / "flickr8k_1k"), "test")
    assert len(data) == 125
    assert all(len(c) == 5 for c in data["captions"])
    assert len(load_questions(str(shared / "data" / "daquar"), "test")) == 4958
    assert load_questions(str(shared / "data" / "vqa2_73img"), "train")[0]["image"].mode == "RGB"
