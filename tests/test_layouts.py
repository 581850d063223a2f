"""Every layout gives the same examples; which reader a directory gets; splits."""

import json
import logging
import re

import annotation_layouts as written
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_layouts import PAIRS, QUESTIONS, Pair, Question, put
from conftest import noise_image
from datasets import Dataset, Features, List, Value
from PIL import Image

from vlprune.data import annotation_files, load_answers, load_pairs, load_questions

SPLITS = {"train": 6, "val": 3, "test": 4}


@pytest.fixture(autouse=True)
def _own_caches(own_caches):
    """Every test here reads tables into caches of its own."""


@pytest.fixture
def pairs(tmp_path):
    """Pictures of noise with two or three captions each."""
    (tmp_path / "noise").mkdir()
    made = []
    for split, count in SPLITS.items():
        for _ in range(count):
            number = 100 + len(made)
            noise_image(number, 8 + number % 5).save(file := tmp_path / "noise" / f"{number}.png")
            captions = [f"a {word} picture, number {number}" for word in ("first", "second", "third")[: 2 + number % 2]]
            made.append(Pair(file, number, split, captions))
    return made


@pytest.fixture
def questions(pairs):
    return [
        Question(pair, 10 * pair.number + i, f"{word} is in picture {pair.number}?", ["yes"] * 6 + [f"no {i}"] * 4)
        for pair in pairs
        for i, word in enumerate(("Who", "What"))
    ]


def shown(data):
    """What the rows hold, with the bytes of the pictures."""
    rows = []
    for row in data:
        image = row.pop("image")
        rows.append(row | {"image": (image.mode, image.size, image.tobytes())})
    return rows


def expected(pairs, split):
    rows = []
    for pair in pairs:
        if pair.split == split:
            with Image.open(pair.file) as image:
                picture = image.convert("RGB")
            rows.append((pair.captions, (picture.mode, picture.size, picture.tobytes())))
    return rows


@pytest.mark.parametrize("layout", PAIRS)
def test_all_layouts_give_the_same_pairs(layout, pairs, tmp_path):
    PAIRS[layout](tmp_path / layout, pairs)
    data = str(tmp_path / layout / "*.jsonl") if layout == "json_lines" else str(tmp_path / layout)
    for split, count in SPLITS.items():
        rows = shown(load_pairs(data, split))
        assert len(rows) == count
        assert [(row["captions"], row["image"]) for row in rows] == expected(pairs, split)
        ids = [pair.number for pair in pairs if pair.split == split]
        assert [row["image_id"] for row in rows] == ([f"{i:09d}" for i in ids] if layout == "shards" else ids)
        assert {tuple(row) for row in rows} == {("image_id", "captions", "regions", "image")}
        assert all(row["regions"] == [] for row in rows)
    both = shown(load_pairs(data, "test+train"))
    assert both == shown(load_pairs(data, "test")) + shown(load_pairs(data, "train"))
    assert shown(load_pairs(data, "test+train", 5)) == both[:5]


@pytest.mark.parametrize("layout", QUESTIONS)
def test_all_layouts_give_the_same_questions(layout, questions, tmp_path):
    QUESTIONS[layout](tmp_path / layout, questions)
    rows = load_questions(str(tmp_path / layout), "train+val")
    wanted = [q for q in questions if q.image.split != "test"]
    assert rows.remove_columns("image").to_list() == [
        {
            "image_id": q.image.number,
            "question": q.text,
            "question_id": q.number,
            "answers": q.answers,
            "answer_type": q.kind,
            "weight": 1.0,
        }
        for q in wanted
    ]
    assert rows[3]["image"].tobytes() == expected([wanted[3].image], "train")[0][1][2]


@pytest.mark.parametrize("layout", QUESTIONS)
def test_questions_of_a_split_need_no_other_split(layout, questions, tmp_path):
    QUESTIONS[layout](tmp_path / layout, [q for q in questions if q.image.split == "test"])
    assert load_questions(str(tmp_path / layout), "test", 3)["question_id"][:] == [q.number for q in questions[-8:-5]]
    assert load_answers(str(tmp_path / layout)) is None


def test_a_table_of_arrow_is_a_data_set_with_its_features():
    """What `datasets.Dataset` promises to no one, and the readers rely on."""
    features = Features(
        {"image": {"path": Value("string")}, "image_id": Value("int64"), "texts": List(Value("string"))}
    )
    columns = {"image": [{"path": "a"}, {"path": "b"}], "image_id": [1, 2], "texts": [["x"], []]}
    data = Dataset(pa.Table.from_pydict(columns, schema=features.arrow_schema))
    assert data.features == features
    assert data.to_dict() == columns
    assert data.data.column("texts").to_pylist() == columns["texts"]


@pytest.mark.parametrize("layout", [name for name in PAIRS if name != "karpathy"])
def test_real_photos_in_every_layout(layout, shared, tmp_path):
    source = shared / "data" / "flickr8k_1k"
    taken = {"train": 5, "val": 2, "test": 3}
    pairs = []
    for row in json.loads((source / "dataset_flickr8k.json").read_text())["images"]:
        if sum(pair.split == row["split"] for pair in pairs) < taken[row["split"]]:
            captions = [sentence["raw"] for sentence in row["sentences"]]
            pairs.append(Pair(source / "images" / row["filename"], row["imgid"], row["split"], captions))
    PAIRS[layout](tmp_path / layout, pairs)
    data = str(tmp_path / layout / "*.jsonl") if layout == "json_lines" else str(tmp_path / layout)
    for split, count in taken.items():
        theirs = shown(load_pairs(str(source), split, count))
        found = shown(load_pairs(data, split))
        for row in (*theirs, *found):
            row["image_id"] = int(row["image_id"])
        assert found == theirs


@pytest.mark.parametrize("layout", ["vqa_lists", "vqa_parquet"])
def test_real_questions_in_every_layout(layout, shared, tmp_path):
    source = shared / "data" / "vqa2_73img"
    theirs = load_questions(str(source), "train", 12)
    files = {int(path.stem.split("_")[-1]): path for path in (source / "images").iterdir()}
    rows = theirs.remove_columns("image").to_list()
    fields = ("question_id", "question", "answers", "answer_type")
    questions = [
        Question(Pair(files[r["image_id"]], r["image_id"], "train", []), *(r[name] for name in fields)) for r in rows
    ]
    QUESTIONS[layout](tmp_path / layout, questions)
    assert shown(load_questions(str(tmp_path / layout), "train")) == shown(theirs)


def test_directory_without_layout_says_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    put(tmp_path / "refcoco_train.json", [{"image": "a.jpg", "bbox": [1, 2, 3, 4], "text": "a dog"}])
    with pytest.raises(
        FileNotFoundError,
        match=r"no pairs.*dataset_\*.json.*captions_\*.json.*ALBEF.*: "
        r"notes.txt, refcoco_train.json$",
    ):
        load_pairs(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r"no questions.*\*questions.json.*notes.txt"):
        load_questions(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r": notes.txt$"):
        load_pairs(str(tmp_path / "notes.*"), "train")


def test_several_layouts_in_one_directory_need_a_file_name(pairs, tmp_path):
    written.karpathy(tmp_path / "d", pairs)
    written.lists(tmp_path / "d", pairs)
    with pytest.raises(ValueError, match=r"Karpathy.*dataset_coco.json.*ALBEF.*coco_karpathy_test.json"):
        load_pairs(str(tmp_path / "d"), "train")
    assert len(load_pairs(str(tmp_path / "d" / "dataset_coco.json"), "train")) == 6
    assert len(load_pairs(str(tmp_path / "d" / "coco_karpathy_*.json"), "train")) == 6
    assert annotation_files(str(tmp_path / "d" / "coco_*.json"), "pairs") == [
        f"coco_karpathy_{split}.json" for split in ("test", "train", "val")
    ]
    put(tmp_path / "d" / "flickr30k_train.json", [{"image": pairs[0].name, "caption": "x", "image_id": "1"}])
    (tmp_path / "d" / "dataset_coco.json").rename(tmp_path / "d" / "old")
    with pytest.raises(
        ValueError, match=r"several lists of split 'train': coco_k\S+, flickr30k_train.json; .* as .*/coco_\*.json"
    ):
        load_pairs(str(tmp_path / "d"), "train")
    with pytest.raises(ValueError, match=r"unknown data set '.*nothing_\*.json'"):
        load_pairs(str(tmp_path / "d" / "nothing_*.json"), "train")


def test_two_karpathy_files_need_a_name(pairs, tmp_path):
    written.karpathy(tmp_path, pairs)
    put(tmp_path / "dataset_flickr30k.json", {"images": []})
    with pytest.raises(ValueError, match=r"dataset_coco.json, dataset_flickr30k.json"):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize("layout", PAIRS)
def test_unknown_split_lists_those_that_exist(layout, pairs, tmp_path):
    PAIRS[layout](tmp_path / layout, pairs)
    data = str(tmp_path / layout / "*.jsonl") if layout == "json_lines" else str(tmp_path / layout)
    with pytest.raises(ValueError, match=r"has no split 'minival'; it has: test, train, val(idation)?$"):
        load_pairs(data, "train+minival")
    for faulty in ("train+", "", "train+train"):
        with pytest.raises(ValueError, match=rf"split.*{re.escape(repr(faulty))}$"):
            load_pairs(data, faulty)


def test_an_image_of_two_splits_is_not_concatenated(pairs, tmp_path):
    written.lists(tmp_path, pairs)
    put(tmp_path / "coco_karpathy_val.json", [{"image": pairs[0].name, "caption": ["x"]}])
    with pytest.raises(ValueError, match=r"split val of train\+val: image_id 100 occurs twice"):
        load_pairs(str(tmp_path), "train+val")


def test_visual_genome_questions_join_with_half_weight(questions, tmp_path):
    written.vqa_lists(tmp_path, questions)
    (tmp_path / "VG_100K").mkdir()
    noise_image(1).save(tmp_path / "VG_100K" / "100.png")
    vg = [{"image": "VG_100K/100.png", "question": q, "answer": "a cat", "dataset": "vg"} for q in ("Who?", "What?")]
    put(tmp_path / "vg_qa.json", vg)
    put(tmp_path / "answer_list.json", ["yes", "no"])
    rows = load_questions(str(tmp_path), "train+val+vg").remove_columns("image").to_list()
    assert len(rows) == 2 * (6 + 3) + 2
    assert rows[-2:] == [
        {
            "image_id": "VG_100K/100.png",
            "question": q,
            "question_id": -i,
            "answers": ["a cat"],
            "answer_type": None,
            "weight": 0.5,
        }
        for i, q in ((1, "Who?"), (2, "What?"))
    ]
    assert rows[0]["image_id"] == "100"  # of COCO, another image
    assert load_questions(str(tmp_path), "train")["image_id"][0] == 100
    assert load_answers(str(tmp_path)) == ["yes", "no"]
    put(tmp_path / "vg_qa.json", [item | {"question_id": 1000} for item in vg])  # a number of a question of VQA
    assert load_questions(str(tmp_path), "train+vg")["question_id"][-2:] == [-1, -2]
    (tmp_path / "answer_list.json").unlink()
    assert load_answers(str(tmp_path)) is None
    assert len(load_questions(str(tmp_path), "vg", 1)) == 1


def test_questions_without_ids_and_tables_without_ids_can_be_summed(questions, pairs, tmp_path):
    written.vqa_lists(tmp_path, questions)
    for path in tmp_path.glob("vqa_*.json"):
        put(path, [{k: v for k, v in item.items() if k != "question_id"} for item in json.loads(path.read_text())])
    assert load_questions(str(tmp_path), "train+val+test")["question_id"][:] == [-i for i in range(1, 27)]
    (tmp_path / "pq").mkdir()
    for split in ("train", "val"):
        encoded = [pair.file.read_bytes() for pair in pairs if pair.split == split]
        columns = {"image": encoded, "caption": ["x"] * len(encoded)}
        pq.write_table(pa.table(columns), tmp_path / "pq" / f"{split}.parquet")
    found = load_pairs(str(tmp_path / "pq"), "train+val")["image_id"][:]
    assert found == [*(f"train {i}" for i in range(6)), *(f"val {i}" for i in range(3))]


def test_an_id_of_two_images_in_two_splits_is_refused(pairs, tmp_path):
    for split, pair in (("val", pairs[0]), ("test", pairs[1])):
        (tmp_path / split).mkdir()
        (tmp_path / split / "p_1.png").write_bytes(pair.file.read_bytes())
        item = {"image": f"{split}/p_1.png", "question": "Who?", "answer": ["yes", "no"], "question_id": len(split)}
        put(tmp_path / f"vqa_{split}.json", [item])
    with pytest.raises(
        ValueError, match=r"split test of val\+test: image_id 1 is \S+/test/p_1.png, before \S+/val/p_1"
    ):
        load_questions(str(tmp_path), "val+test")


def test_test_questions_need_no_answers(questions, tmp_path):
    written.vqa_lists(tmp_path / "lists", questions)
    path = tmp_path / "lists" / "vqa_test.json"
    items = [{k: v for k, v in item.items() if k != "answer"} for item in json.loads(path.read_text())]
    put(path, items)
    put(tmp_path / "lists" / "vqa_val.json", items)
    assert load_questions(str(tmp_path / "lists"), "test")["answers"][:] == [[]] * 8
    with pytest.raises(ValueError, match=r"vqa_val.json, item 0: lacks answer; it has"):
        load_questions(str(tmp_path / "lists"), "val")
    root = tmp_path / "official"
    written.vqa_official(root, questions)
    (root / "v2_mscoco_test2014_annotations.json").unlink()
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    (root / "v2_OpenEnded_mscoco_test2014_questions.json").rename(root / "v2_mscoco_test-dev2015_questions.json")
    assert load_questions(str(root), "test-dev")["answers"][:] == [[]] * 8
    with pytest.raises(ValueError, match=r"no \*questions.json of split 'test'; it has: test-dev, train, val"):
        load_questions(str(root), "test")
    with pytest.raises(ValueError, match=r"no \*annotations.json of split 'val'; it has: train"):
        load_questions(str(root), "val")


def test_lists_without_captions_say_so(pairs, tmp_path, caplog):
    written.copy_images(tmp_path, pairs)
    put(tmp_path / "nocaps_test.json", [{"image": p.name, "img_id": i} for i, p in enumerate(pairs)])
    with caplog.at_level(logging.WARNING):
        data = load_pairs(str(tmp_path), "test")
    assert "nocaps_test.json, item 0" in caplog.text
    assert data["captions"][:] == [[]] * 13
    assert data["image_id"][:] == list(range(13))
    put(tmp_path / "nocaps_test.json", [{"image": pairs[0].name, "caption": ["x"]}, {"image": pairs[1].name}])
    with pytest.raises(ValueError, match=r"nocaps_test.json, item 1: lacks caption"):
        load_pairs(str(tmp_path), "test")
    (tmp_path / "nocaps_test.json").rename(tmp_path / "nocaps_train.json")
    with pytest.raises(ValueError, match=r"nocaps_train.json, item 1: lacks caption; it has: image"):
        load_pairs(str(tmp_path), "train")


def test_pretraining_lists_without_splits_are_training_data(pairs, tmp_path):
    written.copy_images(tmp_path, pairs)
    first, second, third = (pair.name for pair in pairs[:3])
    put(tmp_path / "cc3m.json", [{"image": first, "caption": "a dog", "dataset": "cc3m"}])
    dense = {"image": second, "caption": ["red", "blue"], "bb": [[0, 0, 2, 2], [1, 1, 3, 3]], "dataset": "vg"}
    put(tmp_path / "vg_dense.json", [dense])
    elements = [
        {"bb": [1, 2, 3, 4], "caption": ["cat", "pet"], "attributes": ["black", "small"]},
        {"bb": [0, 0, 4, 4], "caption": "sky", "attributes": []},
    ]
    put(tmp_path / "vg_regions.json", [{"image": third, "elems": elements}, {"image": first, "elems": elements[1:]}])
    rows = load_pairs(str(tmp_path), "train").remove_columns(["image", "image_id"]).to_list()
    sky = {"box": [0, 0, 4, 4], "phrase": "sky"}
    assert rows == [
        {"captions": ["a dog", "sky"], "regions": [sky]},
        {
            "captions": ["red", "blue"],
            "regions": [{"box": [0, 0, 2, 2], "phrase": "red"}, {"box": [1, 1, 3, 3], "phrase": "blue"}],
        },
        {"captions": ["black cat", "sky"], "regions": [{"box": [1, 2, 3, 4], "phrase": "black cat"}, sky]},
    ]
    assert load_pairs(str(tmp_path), "vg_dense+cc3m")["captions"][:] == [["red", "blue"], ["a dog"]]
    with pytest.raises(ValueError, match=r"no split 'val'; it has: cc3m, train, vg_dense, vg_regions"):
        load_pairs(str(tmp_path), "val")


@pytest.mark.parametrize("kind", ["byte order mark", "lines", "capital"])
def test_no_list_of_several_is_dropped(kind, pairs, tmp_path):
    written.copy_images(tmp_path, pairs)
    put(tmp_path / "cc3m.json", [{"image": pairs[0].name, "caption": "a dog"}])
    items = [{"image": pair.name, "caption": "a cat"} for pair in pairs[1:3]]
    if kind == "byte order mark":
        (tmp_path / "sbu.json").write_text(json.dumps(items), encoding="utf-8-sig")
        assert load_pairs(str(tmp_path), "train")["captions"][:] == [["a dog"], ["a cat"], ["a cat"]]
        return
    if kind == "lines":
        (tmp_path / "sbu.json").write_text("\n".join(map(json.dumps, items)))
    else:
        put(tmp_path / "sbu.json", [{"Image": item["image"], "caption": "a cat"} for item in items])
    with pytest.raises(ValueError, match=r"sbu.json(, item 0: lacks image; it has: Image| is no JSON: Extra data)"):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"caption": "x"}, r"list_train.json, item 1: lacks image; it has: caption"),
        ({"image": 3, "caption": "x"}, r"item 1: image must be str, got 3"),
        ({"image": "IMAGE", "caption": ""}, r"item 1: caption must be a text that is not empty, got ''"),
        ({"image": "IMAGE", "caption": []}, r"item 1: caption must be a text that is not empty, got \[\]"),
        ({"image": "IMAGE", "caption": [" "]}, r"item 1: caption must be a text that is not empty, got ' '"),
        ({"image": "IMAGE", "caption": 5}, r"item 1: caption must be str or list, got 5"),
        ({"image": "IMAGE", "caption": "x", "image_id": 1}, r"item 1: image_id 1 is that of image '.*100.png', too"),
        ({"image": "IMAGE", "caption": "x", "image_id": [1]}, r"item 1: image_id must be int or str"),
        ({"image": "IMAGE", "caption": "x", "bb": [1, 2, 3]}, r"item 1: bb must be 4 numbers"),
        ({"image": "IMAGE", "caption": ["x"], "bb": [[1, 2, 3, 4]] * 2}, r"item 1: 2 boxes in bb for 1 captions"),
        ({"image": "IMAGE", "elems": [{"bb": [1, 2, 3, 4]}]}, r"item 1, element 0: lacks caption; it has: bb"),
        ("x", r"item 1: wanted an object with image, got str"),
    ],
)
def test_malformed_lists_are_named(item, message, pairs, tmp_path):
    written.copy_images(tmp_path, pairs)
    if isinstance(item, dict) and item.get("image") == "IMAGE":
        item = item | {"image": pairs[1].name}
    put(tmp_path / "list_train.json", [{"image": pairs[0].name, "caption": "x", "image_id": 1}, item])
    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path), "train")


def test_malformed_question_lists_are_named(questions, tmp_path):
    written.vqa_lists(tmp_path, questions)
    good = json.loads((tmp_path / "vqa_val.json").read_text())
    for change, message in (
        ({"question_id": good[0]["question_id"]}, r"vqa_val.json, item 1: question_id 1060 occurs twice"),
        ({"question_id": "x"}, r"item 1: question_id 'x' is str, those before are int"),
        ({"question": ""}, r"item 1: question must be a text that is not empty"),
        ({"answer": ["yes", 3]}, r"item 1: answer must be str, got 3"),
        ({"answer": []}, r"item 1: answer must be a text that is not empty"),
        ({"image": "../x.png"}, r"item 1: image path '../x.png' leaves"),
        ({"image": "val2014/gone_1.png"}, r"item 1: there is no image .*gone_1.png"),
    ):
        put(tmp_path / "vqa_val.json", [good[0], good[1] | change, *good[2:]])
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_questions(str(tmp_path), "val")
    put(tmp_path / "answer_list.json", ["yes", 3])
    with pytest.raises(ValueError, match=r"answer_list.json, item 1: answer must be str, got 3"):
        load_answers(str(tmp_path))


def test_malformed_official_captions_are_named(pairs, tmp_path):
    written.official(tmp_path, pairs)
    path = tmp_path / "annotations" / "captions_val2014.json"
    good = json.loads(path.read_text())
    for change, message in (
        (
            {"images": good["images"][:-1]},
            r"captions_val2014.json, annotations \d+: image_id 108 is not among the images",
        ),
        ({"annotations": good["annotations"][3:]}, r"images 0: an image without captions"),
        ({"images": [*good["images"], good["images"][0]]}, r"images 3: id 106 occurs twice"),
        ({"annotations": [{"image_id": 106}]}, r"annotations 0: lacks caption"),
    ):
        put(path, good | change)
        with pytest.raises(ValueError, match=message):
            load_pairs(str(tmp_path), "val")
    put(path.with_name("captions_val2017.json"), good)
    with pytest.raises(ValueError, match=r"caption files of split 'val': captions_val2014.json, captions_val2017.json"):
        load_pairs(str(tmp_path), "val")
    assert len(load_pairs(str(path.with_name("captions_*2014.json")), "train")) == 6
