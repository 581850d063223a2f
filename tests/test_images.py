"""Where images may lie, links that lead outside, images that cannot be read."""

import json
import logging
import os
import time

import numpy as np
import pytest
from annotation_layouts import put
from conftest import noise_image
from PIL import Image

from vlprune.data import broken_images, calibration_batches, data_digest, load_pairs, load_questions


class Regions:
    uses_regions = True


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))


def one_image(root, name, at):
    """A list that names one image, and the image somewhere."""
    (root / at).parent.mkdir(parents=True, exist_ok=True)
    noise_image(1).save(root / at)
    put(root / "a_train.json", [{"image": name, "caption": "x"}])


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("train2014/a1.png", "images/train2014/a1.png"),
        ("train2014/a1.png", "train2014/a1.png"),
        ("train2014/a1.png", "images/a1.png"),
        ("train2014/a1.png", "a1.png"),
        ("coco/images/train2014/a1.png", "images/train2014/a1.png"),
        ("coco/images/train2014/a1.png", "train2014/a1.png"),
        ("images/a1.png", "images/a1.png"),
    ],
)
def test_images_are_found_with_or_without_the_folders_of_the_list(name, at, tmp_path):
    one_image(tmp_path / "d", name, at)
    assert load_pairs(str(tmp_path / "d"), "train")[0]["image"].tobytes() == noise_image(1).tobytes()


@pytest.mark.parametrize("name", ["../a1.png", "/etc/passwd", "x/../../a1.png", "x/../a1.png", ""])
def test_image_paths_do_not_leave_their_directory(name, tmp_path):
    one_image(tmp_path / "d", name, "a1.png")
    noise_image(1).save(tmp_path / "a1.png")
    with pytest.raises(ValueError, match=r"a_train.json, item 0: image path '.*' leaves"):
        load_pairs(str(tmp_path / "d"), "train")


def test_links_do_not_lead_outside(tmp_path):
    outside = tmp_path / "outside"
    one_image(outside, "x", "in/a1.png")
    noise_image(2).save(outside / "in" / "a1.png")
    one_image(tmp_path / "d", "in/b1.png", "b/other.png")
    (tmp_path / "d" / "in").mkdir()
    link = tmp_path / "d" / "in" / "b1.png"
    link.symlink_to(tmp_path / "d" / "b" / "other.png")
    assert len(load_pairs(str(tmp_path / "d"), "train")) == 1
    link.unlink()
    link.symlink_to(outside / "in" / "a1.png")
    with pytest.raises(
        ValueError, match=r"a_train.json, item 0: image path '.*b1.png' leaves .*, it is .*/outside/in/a1"
    ):
        load_pairs(str(tmp_path / "d"), "train")
    link.unlink()
    link.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"image path '.*b1.png' leaves"):
        load_pairs(str(tmp_path / "d"), "train")
    link.unlink()
    link.parent.rmdir()
    link.parent.symlink_to(outside / "in")
    put(tmp_path / "d" / "a_train.json", [{"image": "in/a1.png", "caption": "x"}])
    with pytest.raises(ValueError, match=r"item 0: image path 'in/a1.png' leaves"):
        load_pairs(str(tmp_path / "d"), "train")
    link.parent.unlink()
    (tmp_path / "d" / "images").symlink_to(outside)  # the folder of all images may be a link itself
    assert load_pairs(str(tmp_path / "d"), "train")[0]["image"].size == (32, 32)


def test_links_of_numbered_images_do_not_lead_outside(dataset, tmp_path):
    picture = dataset / "images" / "0017.png"
    picture.rename(tmp_path / "0017.png")
    picture.symlink_to(tmp_path / "0017.png")
    with pytest.raises(ValueError, match=r"test_questions.json, questions 0: image path '.*0017.png' leaves"):
        load_questions(str(dataset), "test")


def test_two_names_of_one_file_are_an_error(tmp_path):
    one_image(tmp_path, "a/1.png", "images/1.png")
    put(tmp_path / "a_train.json", [{"image": f"{folder}/1.png", "caption": "x"} for folder in "ab"])
    with pytest.raises(ValueError, match=r"item 1: image path 'b/1.png' and, before, 'a/1.png' stand for one file"):
        load_pairs(str(tmp_path), "train")


def test_numbered_images_of_several_years_are_told_apart_by_the_question_file(tmp_path):
    for folder, number in (("val2014", 1), ("val2017", 2)):
        (tmp_path / folder).mkdir()
        noise_image(number).save(tmp_path / folder / "000000000007.png")
    for year in (2014, 2017):
        for path in tmp_path.glob("v2_*"):
            path.unlink()
        question = {"question_id": 1, "image_id": 7, "question": "Who?"}
        put(tmp_path / f"v2_OpenEnded_mscoco_val{year}_questions.json", {"questions": [question]})
        answers = [{"answer": "x"}] * 10
        put(
            tmp_path / f"v2_mscoco_val{year}_annotations.json",
            {"annotations": [{"question_id": 1, "answers": answers}]},
        )
        found = load_questions(str(tmp_path), "val")[0]["image"]
        assert found.tobytes() == noise_image({2014: 1, 2017: 2}[year]).tobytes()


def test_a_missing_image_is_not_that_of_the_same_name_higher_up(dataset):
    images = dataset / "images"
    document = json.loads((dataset / "dataset_small.json").read_text())
    for row in document["images"]:
        row["filename"] = f"a/{row['filename']}"
    (dataset / "dataset_small.json").write_text(json.dumps(document))
    assert len(load_pairs(str(dataset), "train")) == 12  # there is no folder a
    (images / "a").mkdir()
    for path in images.glob("*.png"):
        path.rename(images / "a" / path.name)
    (images / "a" / "0002.png").rename(images / "0002.png")
    with pytest.raises(FileNotFoundError, match=r"images 1: there is no image .*images/a/0002.png"):
        load_pairs(str(dataset), "train")


def test_numbered_images_lie_in_either_place_and_behind_links_that_stay(dataset, tmp_path):
    images = dataset / "images"
    (images / "0001.png").rename(dataset / "0001.png")
    (dataset / "more").mkdir()
    (images / "0002.png").rename(dataset / "more" / "0002.png")
    (images / "linked").symlink_to(dataset / "more")
    (images / "again").symlink_to(images)
    assert len(load_questions(str(dataset), "train")) == 12
    (tmp_path / "outside").mkdir()
    (images / "0003.png").rename(tmp_path / "outside" / "0003.png")
    (images / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(FileNotFoundError, match=r"ends with 3; links that leave it are not followed: \S+/images/out$"):
        load_questions(str(dataset), "train")


def spoil(dataset):
    """A truncated, an empty, a missing image and one that is text, and what is said of them."""
    images = dataset / "images"
    whole = (images / "0002.png").read_bytes()
    (images / "0002.png").write_bytes(whole[: len(whole) // 2])
    (images / "0005.png").write_bytes(b"")
    (images / "0006.png").write_text("<html>not found</html>")
    (images / "0009.png").unlink()
    return {1: "cannot read image", 4: "cannot read image", 5: "cannot read image", 8: "there is no image"}


def test_broken_images_are_named_with_their_annotation(dataset):
    said = spoil(dataset)
    with pytest.raises(FileNotFoundError, match=r"dataset_small.json, images 8: there is no image .*0009.png"):
        load_pairs(str(dataset), "train")
    data = load_pairs(str(dataset), "train", limit=8)
    for row, message in said.items():
        if row < 8:
            with pytest.raises(ValueError, match=rf"dataset_small.json, images {row}: {message} .*/000{row + 1}.png"):
                data[row]
    with pytest.raises(FileNotFoundError, match=r"train_questions.json, questions 8: no image in .* ends with 9"):
        load_questions(str(dataset), "train")


def test_broken_images_are_left_out_counted_and_listed(dataset, caplog):
    said = spoil(dataset)
    data = load_pairs(str(dataset), "train", skip_broken=True)
    assert data["image_id"][:] == [1, 3, 4, 7, 8, 10, 11, 12]
    assert [row["image"].size for row in data] == [(32, 32)] * 8
    assert ": left out 4 images that cannot be read: " in caplog.text
    assert caplog.text.rstrip().endswith("; and 1 more")
    listed = broken_images(str(dataset), "pairs", "train")
    assert len(listed) == 4
    for (row, message), line in zip(said.items(), listed):
        assert line.startswith(f"{dataset}/dataset_small.json, images {row}: {message} ")
        assert line.count("dataset_small.json") == 1
    assert load_pairs(str(dataset), "train", limit=3, skip_broken=True)["image_id"][:] == [1, 3, 4]
    assert len(broken_images(str(dataset), "pairs", "train", 3)) == 1
    questions = load_questions(str(dataset), "train", skip_broken=True)
    assert questions["question_id"][:] == [1, 3, 4, 7, 8, 10, 11, 12]
    assert len(broken_images(str(dataset), "questions", "train+val")) == 4


def test_nothing_is_said_of_whole_images(dataset, caplog):
    data = load_pairs(str(dataset), "train", skip_broken=True)
    assert data.to_list() == load_pairs(str(dataset), "train").to_list()
    assert broken_images(str(dataset), "pairs", "train") == []
    assert caplog.records == []


def test_malformed_entries_stay_errors(dataset):
    document = json.loads((dataset / "dataset_small.json").read_text())
    document["images"][3].pop("sentences")
    put(dataset / "dataset_small.json", document)
    with pytest.raises(ValueError, match=r"images 3: lacks sentences"):
        load_pairs(str(dataset), "train", skip_broken=True)


def test_an_image_is_decoded_once_however_many_questions_it_has(dataset, monkeypatch):
    path = dataset / "train_questions.json"
    rows = json.loads(path.read_text())["questions"]
    more = [row | {"question_id": row["question_id"] + 100} for row in rows]
    put(path, {"questions": rows + more})
    path = dataset / "train_annotations.json"
    rows = json.loads(path.read_text())["annotations"]
    put(path, {"annotations": rows + [row | {"question_id": row["question_id"] + 100} for row in rows]})
    opened = []
    monkeypatch.setattr("vlprune.data.layouts.CHUNK", 5)
    monkeypatch.setattr(
        "vlprune.data.layouts.open_image", lambda image: opened.append(image["path"]) or Image.new("L", (1, 1))
    )
    assert len(load_questions(str(dataset), "train", skip_broken=True)) == 24
    load_questions(str(dataset), "train", skip_broken=True)
    broken_images(str(dataset), "questions", "train")
    assert len(opened) == len(set(opened)) == 12
    load_questions(str(dataset), "train")
    assert len(opened) == 12


def test_calibration_puts_other_pairs_in_the_place_of_broken_ones(dataset, caplog):
    def drawn(n, first=0, skip_broken=True):
        return calibration_batches(
            str(dataset), Regions(), n_batches=n, batch_size=4, seed=2, first=first, skip_broken=skip_broken
        )

    whole = [list(batch.texts) for batch in drawn(3)]
    assert whole == [list(batch.texts) for batch in drawn(3, skip_broken=False)]
    picture = dataset / "images" / f"{int(whole[1][2].split()[-1]):04d}.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:100])
    with pytest.raises(ValueError, match=rf"images \d+: cannot read image .*{picture.name}"):
        list(drawn(3, skip_broken=False))
    made = drawn(3)
    found = [list(batch.texts) for batch in made]
    assert found[0] == whole[0]
    assert found[2] == whole[2]
    assert [a.split()[-1] == b.split()[-1] for a, b in zip(found[1], whole[1])] == [True, True, False, True]
    assert len({text.split()[-1] for text in found[1]}) == 4
    assert [list(batch.texts) for batch in made] == found
    assert [list(batch.texts) for batch in drawn(1, first=1)] == found[1:2]
    assert made.broken == [
        f"{dataset}/dataset_small.json, images {int(picture.stem) - 1}: " + made.broken[0].split(": ", 1)[1]
    ]
    assert "left out 1 images" in caplog.text
    picture.unlink()
    made = drawn(3)
    assert len(made.broken) == 1
    assert all(len(batch.texts) == 4 for batch in made)
    with pytest.raises(FileNotFoundError, match="there is no image"):
        drawn(3, skip_broken=False)
    for path in sorted((dataset / "images").glob("00*.png"))[:9]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"too few images can be read for a batch of 4"):
        list(drawn(1))


def test_warnings_are_logged_where_a_sweep_prints_them(dataset, caplog):
    spoil(dataset)
    with caplog.at_level(logging.WARNING):
        load_pairs(str(dataset), "train", skip_broken=True)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert {record.name for record in caplog.records} == {"vlprune.data.images"}


def test_kept_digest_is_that_of_the_files(dataset, monkeypatch):
    fresh = data_digest(str(dataset))
    assert not list((dataset.parent / "cache").rglob("*.json"))  # the files are too young to trust their times
    past = time.time() - 100
    for path in dataset.rglob("*"):
        os.utime(path, (past, past))
    assert data_digest(str(dataset)) == fresh
    assert len(list((dataset.parent / "cache" / "digests").iterdir())) == 1
    monkeypatch.setattr("vlprune.data.digest._hash", lambda files: pytest.fail("read again"))
    assert data_digest(str(dataset)) == fresh
    monkeypatch.undo()
    monkeypatch.setenv("VLPRUNE_CACHE", str(dataset.parent / "cache"))
    picture = dataset / "images" / "0003.png"
    content = np.frombuffer(picture.read_bytes(), np.uint8).copy()
    content[60] ^= 1
    picture.write_bytes(content.tobytes())
    changed = data_digest(str(dataset))
    assert changed != fresh
    [kept] = (dataset.parent / "cache" / "digests").iterdir()
    for broken in ("", "[]", '{"listing": 1}'):
        kept.write_text(broken)
        assert data_digest(str(dataset)) == changed


def test_digest_sees_images_outside_of_the_image_folder(tmp_path):
    one_image(tmp_path / "d", "train2014/a1.png", "train2014/a1.png")
    before = data_digest(str(tmp_path / "d"))
    (tmp_path / "d" / "notes.txt").write_text("x")
    (tmp_path / "d" / "train2014" / "gone.png").symlink_to("nothing")
    assert data_digest(str(tmp_path / "d")) == before
    noise_image(2).save(tmp_path / "d" / "train2014" / "a1.png")
    assert data_digest(str(tmp_path / "d")) != before
