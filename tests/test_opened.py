import pytest
from conftest import noise_image
from PIL import Image

from vlprune.data import load_pairs, opened
from vlprune.data.opened import Kept


def red(size):
    return Image.new("RGB", (size, size), (255, 0, 0))


def test_pictures_asked_for_last_are_kept_within_the_limit():
    kept, made = Kept(limit=3 * 2 * 4), []  # two pictures of 2 x 2 pixels

    def get(key, size=2):
        return kept.get(key, lambda: made.append(key) or red(size))

    assert get("a") is get("a")
    get("b")
    get("a")
    get("c")  # instead of b, which was asked for before a
    get("a")
    get("b")
    assert made == ["a", "b", "c", "b"]
    get("large", 9)
    get("large", 9)
    assert made[-2:] == ["large", "large"], "what is larger than the limit is not kept"


@pytest.fixture
def opening(monkeypatch):
    """The images that were opened, and none kept from before."""
    names, real = [], opened.open_image
    monkeypatch.setattr(opened, "_KEPT", Kept(opened.LIMIT))
    monkeypatch.setattr(opened, "open_image", lambda image: names.append(image["path"]) or real(image))
    return names


def test_an_image_is_opened_once_in_a_process(dataset, opening):
    first, second = (load_pairs(str(dataset), "train") for _ in range(2))
    pictures = [row["image"].tobytes() for row in first]
    assert [row["image"].tobytes() for row in second] == pictures
    assert len(opening) == len(set(opening)) == len(pictures)


def test_a_file_that_changes_is_opened_anew(dataset, opening):
    pairs = load_pairs(str(dataset), "train")
    before = pairs[0]["image"].tobytes()
    noise_image(99).save(opening[0])
    assert pairs[0]["image"].tobytes() != before
    assert opening[0] == opening[1]


def test_a_file_that_is_gone_is_named_although_its_picture_is_kept(dataset, opening, tmp_path):
    pairs = load_pairs(str(dataset), "train")
    assert pairs[0]["image"]
    gone = tmp_path / "gone.png"
    path = type(gone)(opening[0])
    path.rename(gone)
    try:
        with pytest.raises(ValueError, match=f"cannot read image {path}"):
            pairs[0]
    finally:
        gone.rename(path)
