"""Where images may lie, links that lead outside, images that cannot be read, fingerprints."""

import errno
import json
import logging
import os
import shutil

import numpy as np
import pytest
from annotation_layouts import put
from conftest import noise_image
from PIL import Image

from vlprune import data
from vlprune.data import calibration_batches, data_fingerprint, left_out, load_pairs, load_questions
from vlprune.data.decode import open_image
from vlprune.data.images import ImageFolder


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
    with pytest.raises(ValueError, match=r"item 1: .*'b/1.png'.* 'a/1.png'.*images/1.png"):
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
    with pytest.raises(FileNotFoundError, match=r"ends with 3\b.*links.*: \S+/images/out$"):
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
    with pytest.raises(FileNotFoundError, match=r"train_questions.json, questions 8: no image .* ends with 9"):
        load_questions(str(dataset), "train")


def test_broken_images_are_left_out_counted_and_listed(dataset, caplog):
    said = spoil(dataset)
    data = load_pairs(str(dataset), "train", skip_broken=True)
    assert data["image_id"][:] == [1, 3, 4, 7, 8, 10, 11, 12]
    assert [row["image"].size for row in data] == [(32, 32)] * 8
    assert [caplog.text.count(part) for part in ("4 images", "dataset_small.json, images", "1 more")] == [1, 3, 1]
    listed = left_out(str(dataset), "pairs", "train")
    assert len(listed) == 4
    for (row, message), line in zip(said.items(), listed):
        assert line.startswith(f"dataset_small.json, images {row}: {message} images/000{row + 1}.png")
        assert line.count("dataset_small.json") == 1
    assert load_pairs(str(dataset), "train", limit=3, skip_broken=True)["image_id"][:] == [1, 3, 4]
    assert len(left_out(str(dataset), "pairs", "train", 3)) == 1
    questions = load_questions(str(dataset), "train", skip_broken=True)
    assert questions["question_id"][:] == [1, 3, 4, 7, 8, 10, 11, 12]
    assert len(left_out(str(dataset), "questions", "train+val")) == 4


def test_nothing_is_said_of_whole_images(dataset, caplog):
    data = load_pairs(str(dataset), "train", skip_broken=True)
    assert data.to_list() == load_pairs(str(dataset), "train").to_list()
    assert left_out(str(dataset), "pairs", "train") == []
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
    monkeypatch.setattr("vlprune.data.broken.CHUNK", 5)
    monkeypatch.setattr(
        "vlprune.data.broken.open_image", lambda image: opened.append(image["path"]) or Image.new("L", (1, 1))
    )
    assert len(load_questions(str(dataset), "train", skip_broken=True)) == 24
    load_questions(str(dataset), "train", skip_broken=True)
    left_out(str(dataset), "questions", "train")
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
    assert "1 images" in caplog.text
    picture.unlink()
    made = drawn(3)
    assert len(made.broken) == 1
    assert all(len(batch.texts) == 4 for batch in made)
    with pytest.raises(FileNotFoundError, match="there is no image"):
        drawn(3, skip_broken=False)
    for path in sorted((dataset / "images").glob("00*.png"))[:9]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"batch of 4\b.*00"):
        list(drawn(1))


def test_warnings_are_logged_where_a_sweep_prints_them(dataset, caplog):
    spoil(dataset)
    with caplog.at_level(logging.WARNING):
        load_pairs(str(dataset), "train", skip_broken=True)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert {record.name for record in caplog.records} == {"vlprune.data.images"}


def test_kept_fingerprint_is_that_of_the_files(dataset, monkeypatch):
    fresh = data_fingerprint(str(dataset))
    assert not list((dataset.parent / "cache").rglob("*.json"))  # the files are too young to trust their times
    monkeypatch.setattr("vlprune.data.fingerprint.SETTLED", 0.0)
    assert data_fingerprint(str(dataset)) == fresh
    assert len(list((dataset.parent / "cache" / "fingerprints").iterdir())) == 1
    monkeypatch.setattr("vlprune.data.fingerprint._hash", lambda *_: pytest.fail("read again"))
    assert data_fingerprint(str(dataset)) == fresh
    monkeypatch.undo()
    monkeypatch.setenv("VLPRUNE_CACHE", str(dataset.parent / "cache"))
    picture = dataset / "images" / "0003.png"
    content = np.frombuffer(picture.read_bytes(), np.uint8).copy()
    content[60] ^= 1
    picture.write_bytes(content.tobytes())
    changed = data_fingerprint(str(dataset))
    assert changed != fresh
    [kept] = (dataset.parent / "cache" / "fingerprints").iterdir()
    for broken in ("", "[]", '{"listing": 1}'):
        kept.write_text(broken)
        assert data_fingerprint(str(dataset)) == changed


def test_fingerprint_sees_images_outside_of_the_image_folder(tmp_path):
    one_image(tmp_path / "d", "train2014/a1.png", "train2014/a1.png")
    before = data_fingerprint(str(tmp_path / "d"))
    (tmp_path / "d" / "notes.txt").write_text("x")
    (tmp_path / "d" / "train2014" / "gone.png").symlink_to("nothing")
    assert data_fingerprint(str(tmp_path / "d")) == before
    noise_image(2).save(tmp_path / "d" / "train2014" / "a1.png")
    assert data_fingerprint(str(tmp_path / "d")) != before


def test_fingerprint_is_that_of_the_contents_wherever_they_lie(dataset, tmp_path):
    fresh = data_fingerprint(str(dataset))
    shutil.copytree(dataset, tmp_path / "elsewhere")
    assert data_fingerprint(str(tmp_path / "elsewhere")) == fresh
    dataset.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    assert data_fingerprint(str(tmp_path / "moved")) == data_fingerprint(str(tmp_path / "link")) == fresh


@pytest.mark.parametrize("name", ["regions.json", "answer_list.json", "annotations/answer_list.json"])
def test_files_that_readers_find_beside_those_given_count(name, dataset):
    given = str(dataset / "dataset_*.json")
    without = data_fingerprint(given)
    put(dataset / name, ["yes"])
    first = data_fingerprint(given)
    put(dataset / name, ["no!"])
    assert len({without, first, data_fingerprint(given)}) == 3


def test_the_names_of_annotation_files_count(dataset):
    before = data_fingerprint(str(dataset))
    for kind in ("questions", "annotations"):
        (dataset / f"val_{kind}.json").rename(dataset / f"vali_{kind}.json")
    assert data_fingerprint(str(dataset)) != before


def test_a_change_that_keeps_size_and_time_is_seen(dataset, monkeypatch):
    monkeypatch.setattr("vlprune.data.fingerprint.SETTLED", 0.0)
    path = dataset / "dataset_small.json"
    known = path.stat()
    before = data_fingerprint(str(dataset))
    path.write_text(path.read_text().replace("a dog", "a cow"))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    changed = data_fingerprint(str(dataset))
    assert changed != before
    copy = path.with_name("copy")
    copy.write_text(path.read_text().replace("a cow", "a cat"))
    os.utime(copy, ns=(known.st_atime_ns, known.st_mtime_ns))
    copy.rename(path)
    assert data_fingerprint(str(dataset)) not in (before, changed)


def test_links_to_folders_count_by_where_they_lead(dataset):
    for name in ("one", "two"):
        (dataset / name).mkdir()
        noise_image(7).save(dataset / name / "1.png")
    link = dataset / "images" / "linked"
    link.symlink_to(dataset / "one")
    before = data_fingerprint(str(dataset))
    noise_image(8).save(dataset / "one" / "2.png")
    more = data_fingerprint(str(dataset))
    link.unlink()
    link.symlink_to("../two")
    assert len({before, more, data_fingerprint(str(dataset))}) == 3


def forget():
    """Does what a new process would."""
    data._broken.cache_clear()
    data._read.cache_clear()


@pytest.fixture
def opened(monkeypatch):
    """The paths of the images that are decoded in search of broken ones."""
    paths = []
    monkeypatch.setattr(
        "vlprune.data.broken.open_image", lambda image: paths.append(image["path"]) or open_image(image)
    )
    return paths


def test_images_are_decoded_once_by_all_processes(dataset, opened, monkeypatch):
    spoil(dataset)
    monkeypatch.setattr("vlprune.data.fingerprint.SETTLED", 0.0)
    listed = left_out(str(dataset), "pairs", "train")
    assert (len(listed), len(opened)) == (4, 11)
    forget()
    assert left_out(str(dataset), "pairs", "train") == listed
    assert load_pairs(str(dataset), "train", skip_broken=True)["image_id"][:] == [1, 3, 4, 7, 8, 10, 11, 12]
    assert len(opened) == 11
    assert len(left_out(str(dataset), "pairs", "train", 3)) == 1
    assert len(opened) > 11
    noise_image(2).save(dataset / "images" / "0002.png")
    assert len(left_out(str(dataset), "pairs", "train")) == 3
    for kept in (dataset.parent / "cache" / "left_out").iterdir():
        kept.write_text("[]")
    forget()
    assert len(left_out(str(dataset), "pairs", "train")) == 3


def test_left_out_is_the_same_wherever_the_data_lies(dataset, tmp_path, monkeypatch):
    spoil(dataset)
    (dataset / "images" / "unmoved").mkdir()  # the name of the new place, inside another word
    (dataset / "images" / "0005.png").rename(dataset / "images" / "unmoved" / "0005.png")
    document = json.loads((dataset / "dataset_small.json").read_text())
    document["images"][4]["filename"] = "unmoved/0005.png"
    put(dataset / "dataset_small.json", document)
    listed = left_out(str(dataset), "pairs", "train"), left_out(str(dataset), "questions", "train")
    dataset.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for name in ("moved", str(tmp_path / "moved")):
        assert (left_out(name, "pairs", "train"), left_out(name, "questions", "train")) == listed


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "EMFILE", "ENFILE", "ETIMEDOUT"])
def test_a_disk_that_fails_breaks_no_image(error, dataset, monkeypatch):
    spoil(dataset)
    number = getattr(errno, error)
    real = os.open

    def fail(path, *args, **how):
        if str(path).endswith("0003.png"):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **how)

    monkeypatch.setattr(os, "open", fail)
    for call in (
        lambda: load_pairs(str(dataset), "train", 3)[2],
        lambda: load_pairs(str(dataset), "train", skip_broken=True),
        lambda: left_out(str(dataset), "questions", "train"),
        lambda: list(calibration_batches(str(dataset), Regions(), n_batches=4, batch_size=2, seed=0, skip_broken=True)),
    ):
        with pytest.raises(OSError, match=r"0003.png") as raised:
            call()
        assert raised.value.errno == number
    assert not (dataset.parent / "cache" / "left_out").exists()
    monkeypatch.undo()
    monkeypatch.setenv("VLPRUNE_CACHE", str(dataset.parent / "cache"))
    assert len(left_out(str(dataset), "questions", "train")) == 4


def test_a_disk_that_fails_hides_no_image(dataset, monkeypatch):
    (dataset / "images" / "0003.png").rename(dataset / "0003.png")
    (dataset / "images" / "0003.png").symlink_to(dataset / "0003.png")
    stat, scandir = os.stat, os.scandir

    def fail_to_stat(path, **how):
        if str(path).endswith("images/0003.png"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, **how)

    def fail_to_list(path):
        if str(path).endswith("images"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    for name, fail in (("stat", fail_to_stat), ("scandir", fail_to_list)):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            for call in (
                lambda: data_fingerprint(str(dataset)),
                lambda: load_pairs(str(dataset), "train", skip_broken=True),
            ):
                with pytest.raises(OSError, match="images"):
                    call()
            folder = ImageFolder(dataset)
            with pytest.raises(OSError, match="images"):
                folder.find("0003.png", "here")
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fail_to_list)
        with pytest.raises(OSError, match="images"):
            ImageFolder(dataset).numbered(3, "here")
