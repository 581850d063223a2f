"""What `datasets` reads: columns, errors, streams of shards."""

import json
import os
import shutil

import annotation_layouts as written
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_layouts import Pair
from conftest import noise_image
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from vlprune.data import StreamedBatches, calibration_batches, data_fingerprint, load_pairs, load_questions
from vlprune.data.tables import texts_of


class Plain:
    uses_regions = True


@pytest.fixture(autouse=True)
def _own_caches(own_caches):
    """Every test here reads tables into caches of its own."""


@pytest.fixture
def pairs(tmp_path):
    """Twenty training pictures of different sizes."""
    (tmp_path / "noise").mkdir()
    made = []
    for number in range(20):
        noise_image(number, 8 + number).save(file := tmp_path / "noise" / f"{number}.png")
        made.append(Pair(file, number, "train", [f"caption {i} of {number}" for i in range(3)]))
    return made


def batches(data, n, first=0, size=4, seed=0, skip_broken=False):
    made = calibration_batches(
        str(data), Plain(), n_batches=n, batch_size=size, seed=seed, first=first, skip_broken=skip_broken
    )
    assert isinstance(made, StreamedBatches)
    assert len(made) == n
    return made


def content(made):
    return [(list(batch.texts), [image.tobytes() for image in batch.images]) for batch in made]


@pytest.mark.parametrize("layout", ["shards", "parquet"])
def test_streamed_batches_repeat_and_go_on(layout, pairs, tmp_path):
    if layout == "parquet":  # a row a pair; that with a row a caption is not put together in a stream
        pairs = [Pair(p.file, p.number, p.split, p.captions[:1]) for p in pairs]
    getattr(written, layout)(tmp_path / layout, pairs)
    data = tmp_path / layout
    made = batches(data, 7)
    all_of = content(made)
    assert content(made) == all_of
    assert content(batches(data, 3)) + content(batches(data, 4, first=3)) == all_of
    assert content(batches(data, 7, seed=1)) != all_of
    for batch in made:
        for text, image in zip(batch.texts, batch.images):
            number = int(text.split()[-1])
            assert image.tobytes() == noise_image(number, 8 + number).tobytes()
        assert batch.regions == []
    numbers = [text.split()[-1] for texts, _ in all_of[:5] for text in texts]
    assert sorted(map(int, numbers)) == list(range(20))
    assert numbers != sorted(numbers, key=int)


def test_shards_come_in_another_order_each_epoch(pairs, tmp_path, monkeypatch):
    written.shards(tmp_path / "shards", pairs)
    monkeypatch.setattr("vlprune.data.calibration.BUFFER", 1)
    numbers = [int(text.split()[-1]) for texts, _ in content(batches(tmp_path / "shards", 10)) for text in texts]
    epochs = [numbers[:20], numbers[20:]]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert epoch != sorted(epoch)
        assert sorted(epoch) == list(range(20))


def test_streams_are_not_read_whole(pairs, tmp_path, monkeypatch):
    written.shards(tmp_path / "shards", pairs)
    monkeypatch.setattr("vlprune.data.calibration.BUFFER", 4)
    opened = []
    real = WebDataset._get_pipeline_from_tar

    def counted(tar_path, tar_iterator):
        for example in real(tar_path, tar_iterator):
            opened.append(example["__key__"])
            yield example

    monkeypatch.setattr(WebDataset, "_get_pipeline_from_tar", staticmethod(counted))
    made = iter(batches(tmp_path / "shards", 1, size=2))
    opened.clear()
    next(made)
    assert 0 < len(opened) < 12
    assert not (tmp_path / "datasets").exists() or not list((tmp_path / "datasets").rglob("*.arrow"))


def test_streams_put_other_rows_in_the_place_of_broken_ones(pairs, tmp_path, caplog):
    pairs[3].file.write_bytes(pairs[3].file.read_bytes()[:60])
    pairs[11].file.write_bytes(b"")
    written.shards(tmp_path / "shards", pairs)
    with pytest.raises(ValueError, match=r"shards, /\S+/train-0000\d\d.tar 0000000(03|11): cannot read image"):
        content(batches(tmp_path / "shards", 5))
    made = batches(tmp_path / "shards", 10, skip_broken=True)
    all_of = content(made)
    assert [len(texts) for texts, _ in all_of] == [4] * 10
    numbers = {int(text.split()[-1]) for texts, _ in all_of for text in texts}
    assert numbers == set(range(20)) - {3, 11}
    assert len(made.broken) == 2
    assert caplog.text.count("left out 2 images") == 1
    assert content(made) == all_of
    assert caplog.text.count("left out 2 images") == 1
    later = batches(tmp_path / "shards", 4, first=6, skip_broken=True)
    assert content(later) == all_of[6:]
    for pair in pairs:
        pair.file.write_bytes(b"")
    written.shards(tmp_path / "empty", pairs)
    with pytest.raises(ValueError, match=r"1000 images.*: .*train-0000"):
        content(batches(tmp_path / "empty", 1, skip_broken=True))


def test_streams_need_a_batch_and_hold_their_images(pairs, tmp_path):
    written.shards(tmp_path / "shards", pairs)
    with pytest.raises(ValueError, match=r"needs 21 training images, .*shards has 20"):
        content(batches(tmp_path / "shards", 1, size=21))
    (tmp_path / "pq").mkdir()
    rows = {"image": [{"bytes": None, "path": str(pairs[0].file)}] * 8, "caption": ["x"] * 8}
    pq.write_table(pa.table(rows), tmp_path / "pq" / "train.parquet")
    with pytest.raises(ValueError, match=r"image path '.*0.png' leaves .*pq, it is"):
        content(batches(tmp_path / "pq", 1, skip_broken=True))
    with pytest.raises(ValueError, match=r"pq, train row 0: image path '.*0.png' leaves .*pq, it is"):
        load_pairs(str(tmp_path / "pq"), "train")


def test_streams_may_name_the_images_of_their_directory(pairs, tmp_path):
    shutil.copytree(pairs[0].file.parent, tmp_path / "pq" / "images")
    names = [f"images/{pair.file.name}" for pair in pairs]
    whole = [str(tmp_path / "pq" / name) for name in names]
    for images in (names, [{"bytes": None, "path": path} for path in whole]):
        table = pa.table({"image": images, "text": [f"number {pair.number}" for pair in pairs]})
        pq.write_table(table, tmp_path / "pq" / "train.parquet")
        for texts, pictures in content(batches(tmp_path / "pq", 3)):
            for text, picture in zip(texts, pictures):
                number = int(text.split()[1])
                assert picture == noise_image(number, 8 + number).tobytes()
    names[2], names[5] = "images/gone.png", None
    pq.write_table(pa.table({"image": names, "text": ["x"] * len(pairs)}), tmp_path / "pq" / "train.parquet")
    made = batches(tmp_path / "pq", len(pairs) // 4, skip_broken=True)
    assert [len(texts) for texts, _ in content(made)] == [4] * len(made)
    assert len(made.broken) == 2
    with pytest.raises(ValueError, match=r"pq, .*: cannot read image"):
        content(batches(tmp_path / "pq", len(pairs) // 4))


def test_small_tables_are_calibrated_on_as_lists_are(pairs, tmp_path):
    written.image_folder(tmp_path / "folder", pairs)
    written.lists(tmp_path / "lists", pairs)
    both = [
        calibration_batches(str(tmp_path / name), Plain(), n_batches=7, batch_size=4, seed=0)
        for name in ("folder", "lists")
    ]
    assert content(both[0]) == content(both[1])


def test_columns_are_wanted_by_their_usual_names(tmp_path, pairs):
    encoded = pairs[0].file.read_bytes()
    for name, columns, message in (
        (
            "a",
            {"picture": [encoded], "caption": ["x"]},
            r"wanted a column image or img or jpg .*; it has: picture, cap",
        ),
        ("b", {"image": [encoded], "words": ["x"]}, r"wanted a column captions or .*; it has: image, words"),
        ("c", {"image": [3], "caption": ["x"]}, r"column image must hold images, their bytes or their paths, .* int64"),
        (
            "d",
            {"image": [encoded], "caption": [""]},
            r"d, train row 0, caption: wanted texts that are not empty, got ''",
        ),
        ("e", {"image": [encoded], "caption": [3]}, r"wanted texts that are not empty, got 3"),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=message):
            load_pairs(str(tmp_path / name), "train")
    (tmp_path / "f").mkdir()
    pq.write_table(pa.table({"img": [encoded] * 2, "text": ["x", "y"]}), tmp_path / "f" / "val.parquet")
    data = load_pairs(str(tmp_path / "f"), "val")
    assert data["image_id"][:] == ["val 0", "val 1"]
    assert data[1]["image"].tobytes() == noise_image(0, 8).tobytes()
    with pytest.raises(ValueError, match=r"wanted a column question; it has: img, text"):
        load_questions(str(tmp_path / "f"), "val")


def test_questions_of_tables(tmp_path, pairs):
    encoded = pairs[0].file.read_bytes()

    def write(**columns):
        (tmp_path / "q").mkdir(exist_ok=True)
        rows = {"image": [encoded] * 2, "question": ["Who?", "What?"]} | columns
        pq.write_table(pa.table(rows), tmp_path / "q" / "train.parquet")
        pq.write_table(pa.table(rows), tmp_path / "q" / "test.parquet")

    write(answer=["a", "b"])
    assert load_questions(str(tmp_path / "q"), "train")["answers"][:] == [["a"], ["b"]]
    write(question_id=[7, 7], answer=["a", "b"])
    with pytest.raises(ValueError, match="q, train: question_ids occur twice"):
        load_questions(str(tmp_path / "q"), "train")
    write(answer=["a", None])
    with pytest.raises(ValueError, match="q, train row 1: a question without answers in column answer"):
        load_questions(str(tmp_path / "q"), "train")
    assert load_questions(str(tmp_path / "q"), "test")["answers"][:] == [["a"], []]
    write()
    with pytest.raises(ValueError, match="wanted a column answers or answer or json; it has: image, question"):
        load_questions(str(tmp_path / "q"), "train")
    assert load_questions(str(tmp_path / "q"), "test")["answers"][:] == [[], []]


def test_rows_of_one_id_are_one_image_and_rows_without_ids_are_not(tmp_path, pairs):
    (tmp_path / "d").mkdir()
    encoded = [pair.file.read_bytes() for pair in pairs[:4]]

    def ids(values):
        rows = {"image": encoded, "image_id": values, "caption": ["a", "b", "c", "d"]}
        pq.write_table(pa.table(rows), tmp_path / "d" / "train.parquet")
        data = load_pairs(str(tmp_path / "d"), "train")
        return data["image_id"][:], data["captions"][:], [image.size[0] for image in data["image"]]

    assert ids([7, 5, 7, 5]) == ([7, 5], [["a", "c"], ["b", "d"]], [8, 9])
    assert ids(["x", "y", "z", "x"]) == (["x", "y", "z"], [["a", "d"], ["b"], ["c"]], [8, 9, 10])
    assert ids([None, 5, None, 5]) == (
        ["train 0", "train 1", "train 2", "train 3"],
        [["a"], ["b"], ["c"], ["d"]],
        [8, 9, 10, 11],
    )


def test_keys_that_two_shards_use_are_two_images(tmp_path, pairs):
    written.shards(tmp_path / "d", pairs[:4])
    written.shards(tmp_path / "other", [Pair(p.file, p.number - 4, p.split, p.captions) for p in pairs[4:8]])
    (tmp_path / "other" / "train-000000.tar").rename(tmp_path / "d" / "train-000001.tar")
    data = load_pairs(str(tmp_path / "d"), "train")
    assert data["image_id"][3:5] == ["train-000000.tar/000000003", "train-000001.tar/000000000"]
    assert [len(captions) for captions in data["captions"]] == [3] * 8


def test_texts_of_cells():
    assert texts_of("a", "here") == ["a"]
    assert texts_of([{"raw": "a"}, {"caption": ["b", "c"]}, {"answer": "d"}], "here") == ["a", "b", "c", "d"]
    for faulty in (None, "", {"other": "x"}, [1]):
        with pytest.raises(ValueError, match="here: wanted texts that are not empty, got"):
            texts_of(faulty, "here")


def test_broken_images_of_tables_are_named_and_left_out(tmp_path, pairs, caplog):
    pairs[2].file.write_bytes(b"")
    written.parquet(tmp_path / "pq", pairs[:5])
    data = load_pairs(str(tmp_path / "pq"), "train")
    with pytest.raises(ValueError, match=r"pq, train row 6: cannot read image"):
        data[2]
    kept = load_pairs(str(tmp_path / "pq"), "train", skip_broken=True)
    assert kept["image_id"][:] == [0, 1, 3, 4]
    assert "pq, train: left out 1 images" in caplog.text


def test_missing_images_of_a_folder_are_named_and_left_out(tmp_path, pairs):
    written.image_folder(tmp_path / "d", pairs[:4])
    (tmp_path / "d" / "train" / "COCO_train2014_000000000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"d, train row 2: there is no image .*02.png"):
        load_pairs(str(tmp_path / "d"), "train")
    assert load_pairs(str(tmp_path / "d"), "train", 2)["image_id"][:] == [0, 1]
    assert load_pairs(str(tmp_path / "d"), "train", skip_broken=True)["image_id"][:] == [0, 1, 3]
    made = calibration_batches(str(tmp_path / "d"), Plain(), n_batches=1, batch_size=3, seed=0, skip_broken=True)
    assert len(made.broken) == 1
    link = tmp_path / "d" / "train" / "COCO_train2014_000000000002.png"
    link.symlink_to(pairs[2].file)
    with pytest.raises(ValueError, match=r"d, train row 2: image path '.*02.png' leaves .*d, it is .*/noise/2.png"):
        load_pairs(str(tmp_path / "d"), "train")


def test_paths_in_tables_stay_in_their_directory(tmp_path, pairs):
    written.json_lines(tmp_path / "d", pairs[:3])
    path = tmp_path / "d" / "list_train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {"image": "../noise/0.png"}) for line in lines))
    with pytest.raises(ValueError, match=r"train row 0: image path '../noise/0.png' leaves"):
        load_pairs(str(path), "train")
    path.write_text("\n".join(json.dumps(line | {"image": f"gone{i}.png"}) for i, line in enumerate(lines)))
    with pytest.raises(FileNotFoundError, match=r"train row 0: there is no image .*gone0.png"):
        load_pairs(str(path), "train")
    (tmp_path / "d" / "list_val.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"wanted files of one kind, found .csv, .jsonl"):
        load_pairs(str(tmp_path / "d" / "list_*"), "train")


def test_hub_ids_without_the_hub_are_one_clear_line():
    for call in (
        lambda: load_pairs("someone/pictures", "train"),
        lambda: load_questions("someone/pictures:en", "train"),
        lambda: data_fingerprint("someone/pictures"),
        lambda: calibration_batches("someone/pictures", Plain(), n_batches=1, batch_size=1, seed=0),
    ):
        with pytest.raises(ValueError, match=r"someone/pictures\S*: .* hub") as e:
            call()
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"unknown data set '/someone/pictures'"):
        load_pairs("/someone/pictures", "train")


def test_broken_tables_are_one_line(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"d: cannot be read by datasets: ") as e:
        load_pairs(str(tmp_path / "d"), "train")
    assert "\n" not in str(e.value)


def test_fingerprint_of_tables_follows_them(tmp_path, pairs):
    written.shards(tmp_path / "shards", pairs)
    before = data_fingerprint(str(tmp_path / "shards"))
    assert data_fingerprint(str(tmp_path / "shards")) == before
    path = tmp_path / "shards" / "train-000004.tar"
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert data_fingerprint(str(tmp_path / "shards")) != before
    assert data_fingerprint(str(tmp_path / "shards" / "train-000000.tar")) != before
    os.unlink(path)
    assert data_fingerprint(str(tmp_path / "shards")) != before


def test_fingerprint_of_tables_follows_their_card(tmp_path, pairs):
    written.parquet(tmp_path / "pq", pairs[:3])
    before = data_fingerprint(str(tmp_path / "pq"))
    (tmp_path / "pq" / "README.md").write_text("---\nconfigs: []\n---\n")
    assert data_fingerprint(str(tmp_path / "pq")) != before
