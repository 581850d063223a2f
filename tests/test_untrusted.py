"""Files that nobody vouches for: what is wrong with them is said in one line that names the file and the entry."""

import json

import pytest
from conftest import noise_image

from vlprune.data import load_answers, load_pairs, load_questions

HUGE = 2**70
NUMBER = b"1" * 5000  # more digits than Python reads
DEEP = b"[" * 100_000 + b"]" * 100_000
PAIR = {"image": "a1.png", "caption": "x"}
IMAGE = {"filename": "a1.png", "imgid": 1, "split": "train", "sentences": [{"raw": "x"}]}
QUESTION = {"question_id": 1, "image_id": 1, "question": "who?"}
ANSWERS = {"annotations": [{"question_id": 1, "answers": [{"answer": "y"}] * 10}]}
ASKED = {"image": "a1.png", "question": "who?", "answer": ["y"], "question_id": 1}


@pytest.fixture(autouse=True)
def _own_caches(own_caches):
    """Every test here reads tables into caches of its own."""


def written(root, files):
    """A directory with one image and files of JSON, or of bytes as they are."""
    root.mkdir()
    noise_image(1).save(root / "a1.png")
    for name, content in files.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(root)


def named(entry, **values):
    """An entry with values in the place of some."""
    return {**entry, **values}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a_train.json": b""}, "a_train.json is empty$"),
        ({"a_train.json": b" \n"}, "a_train.json is empty$"),
        ({"a_train.json": []}, "a_train.json is empty: it has no entries"),
        ({"a_train.json": json.dumps([PAIR]).encode()[:20]}, "a_train.json is no JSON: .* line 1 column 21"),
        ({"a_train.json": json.dumps([PAIR] * 9).encode()[:-20]}, "a_train.json is no JSON: .* line 1 column"),
        ({"a_test.json": [PAIR], "a_train.json": b"[{"}, "a_train.json is no JSON"),
        ({"a_train.json": b"[" * 100_000}, "a_train.json is nested too deeply: line 1 column 200$"),
        ({"a_train.json": b'[{"image": "a1.png", "x":\n' + DEEP + b"}]"}, "nested too deeply: line 2 column 198$"),
        ({"a_train.json": [PAIR, named(PAIR, image_id=HUGE)]}, "item 1: image_id must be a whole number of 64 bits"),
        ({"a_train.json": [named(PAIR, image_id=-HUGE)]}, f"item 0: image_id .* got -{HUGE}"),
        ({"a_train.json": b'[{"image":"a1.png","caption":"x","image_id":' + NUMBER + b"}]"}, "item 0: image_id must"),
        ({"a_train.json": [named(PAIR, image="a1\ud800.png")]}, r"item 0: image holds half of a character.*\\ud800"),
        ({"a_train.json": [named(PAIR, caption="\udc80")]}, r"item 0: caption holds half of a character.*\\udc80"),
        ({"a_train.json": [named(PAIR, caption=["x", "\udc80"])]}, r"item 0: caption holds half of a character"),
        ({"a_train.json": [named(PAIR, image="a\nb.png")]}, r"item 0: there is no image \S*a b.png$"),
        ({"a_train.json": [named(PAIR, image="a" * 10**6)]}, "item 0: there is no image"),
        (
            {"a_train.json": [{f"k\n{i}": 0 for i in range(10**5)} | {"Image": 1}]},
            "item 0: lacks image.* and 99991 more",
        ),
        ({"a_train.json": b'[{"image":"a1.png","caption":"x","bb":[1,2,3,' + NUMBER + b"]}]"}, "item 0: bb must be 4"),
        ({"a_train.json": [named(PAIR, bb=[0, 0, 1, 10**400])]}, "item 0: bb must be 4 numbers"),
        ({"dataset_a.json": {"images": [named(IMAGE, imgid=HUGE)]}}, "images 0: imgid must be a whole number of 64"),
        ({"dataset_a.json": {"images": [named(IMAGE, sentences=[{"raw": "\ud800"}])]}}, "sentence 0: raw holds half"),
        ({"dataset_a.json": {"images": [named(IMAGE, split=f"s\n{i}", imgid=i) for i in range(99)]}}, "and 89 more"),
        ({"dataset_a.json": {"images": [IMAGE]}, "regions.json": DEEP}, "regions.json is nested too deeply"),
        ({"captions_train2014.json": {"images": [], "annotations": []}}, "no pairs of split 'train' in captions_train"),
        ({"captions_train2014.json": b'{"images":' + DEEP}, "captions_train2014.json is nested too deeply"),
        ({"a_train.jsonl": json.dumps(PAIR).encode()[:-5]}, "cannot be read by datasets"),
        ({"a_train.jsonl": {**PAIR, "image_id": HUGE}}, "train row 0: image_id must be a whole number of 64 bits"),
        ({"a_train.jsonl": b'{"image":"a1.png","caption":"x","y":' + DEEP + b"}"}, "a_train.jsonl, line 1: .* nested"),
    ],
)
def test_hostile_annotations_of_pairs_are_named(files, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_pairs(written(tmp_path / "d", files), "train")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vqa_train.json": []}, "vqa_train.json is empty: it has no entries"),
        ({"vqa_train.json": [named(ASKED, question_id=HUGE)]}, "item 0: question_id must be a whole number of 64"),
        ({"vqa_train.json": [named(ASKED, question="\ud800")]}, "item 0: question holds half of a character"),
        ({"vqa_train.json": [named(ASKED, answer=["\ud800"])]}, "item 0: answer holds half of a character"),
        (
            {"train_questions.json": {"questions": [named(QUESTION, image_id="²")]}},
            "0: image_id must be a whole number",
        ),
        (
            {"train_questions.json": {"questions": [named(QUESTION, image_id="9" * 5000)]}},
            "0: image_id must be a whole",
        ),
        (
            {"train_questions.json": {"questions": [named(QUESTION, question_id=HUGE)]}},
            "0: question_id must be a whole",
        ),
        ({"train_questions.json": {"questions": []}}, "has no split 'train'; it has: none"),
        (
            {"train_annotations.json": {"annotations": [{"question_id": 1, "answers": [{"answer": "\ud800"}] * 10}]}},
            "annotations 0, answer 0: answer holds half of a character",
        ),
    ],
)
def test_hostile_annotations_of_questions_are_named(files, said, tmp_path):
    official = {"train_questions.json": {"questions": [QUESTION]}, "train_annotations.json": ANSWERS}
    whole = files if "vqa_train.json" in files else {**official, **files}
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_questions(written(tmp_path / "d", whole), "train")
    assert "\n" not in str(error.value)


def test_a_hostile_answer_list_is_named(tmp_path):
    data = written(tmp_path / "d", {"vqa_train.json": [ASKED], "answer_list.json": DEEP})
    with pytest.raises(ValueError, match=r"answer_list.json is nested too deeply"):
        load_answers(data)


def test_numbers_and_names_that_nothing_reads_harm_nothing(tmp_path):
    entry = json.dumps(PAIR).encode()[:-1] + b', "licence": ' + NUMBER + b', "z": "\\ud800"}'
    assert load_pairs(written(tmp_path / "d", {"a_train.json": b"[" + entry + b"]"}), "train")["captions"][:] == [["x"]]


def test_ids_of_file_names_beyond_64_bits_are_named(tmp_path):
    data = written(tmp_path / "d", {"a_train.json": [{"image": f"a_{HUGE}.png", "caption": "x"}]})
    noise_image(2).save(tmp_path / "d" / f"a_{HUGE}.png")
    with pytest.raises(ValueError, match=rf"a_train.json, item 0: image_id must be .* 64 bits, got {HUGE}"):
        load_pairs(data, "train")
