import pickle

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

from vlprune.finetune import augment
from vlprune.finetune.augment import OPERATIONS, PaperAugmentation, speaks_of_sides


def array(image):
    return np.asarray(image).astype(int)


def ramp(size=40):
    """Red rises to the right, green downwards."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    return Image.fromarray(np.stack([100 + x, 100 + y, np.full_like(x, 90)], -1).astype(np.uint8))


def outcomes(operation, image, count=40):
    """The different images that an operation makes."""
    torch.manual_seed(0)
    return {operation(image).tobytes(): operation(image) for _ in range(count)}


def test_a_draw_depends_on_its_seed_and_number_alone():
    example = {"image": noise_image(0, 50), "captions": ["a"]}
    paper = PaperAugmentation(32, 5)
    first = paper(example, 3)
    assert first["image"].size == (32, 32)
    assert first["captions"] == ["a"]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = pickle.loads(pickle.dumps(paper))(example, 3)["image"]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(array(again), array(first["image"]))
    others = [PaperAugmentation(32, 6)(example, 3), paper(example, 4)]
    assert not any(np.array_equal(array(other["image"]), array(again)) for other in others)
    assert np.array_equal(array(example["image"]), array(noise_image(0, 50)))


@pytest.mark.parametrize(
    ("example", "sided"),
    [
        ({"captions": ["the left hand"]}, False),
        ({"question": "is it a dog?", "answers": ["yes"]}, False),
        ({"question": "What is LEFT of it?", "answers": ["dog"]}, True),
        ({"question": "where is it?", "answers": ["there", "on the right"]}, True),
    ],
)
def test_a_question_about_sides_is_not_flipped(example, sided, monkeypatch):
    assert speaks_of_sides(example) == sided
    flips = []
    monkeypatch.setattr(augment, "FLIP", lambda image: flips.append(1) or image)
    PaperAugmentation(8, 0)({**example, "image": noise_image(0)}, 0)
    assert bool(flips) != sided


def test_half_of_the_images_are_flipped_and_a_quarter_or_more_left_as_they_are(monkeypatch):
    monkeypatch.setattr(augment, "RANDOM_AUGMENT", lambda image: image)
    paper, image = PaperAugmentation(16, 0), ramp(16)
    rises = [(lambda a: a[0, -1, 0] > a[0, 0, 0])(array(paper({"image": image}, i)["image"])) for i in range(200)]
    assert 70 < sum(rises) < 130
    monkeypatch.undo()
    kept = sum(augment.RANDOM_AUGMENT(image).tobytes() == image.tobytes() for _ in range(300))
    assert 60 < kept < 180  # (1/2 + 1/2 · 1/10)² = 0.30, and what does not show on a ramp


def test_crops_have_half_of_the_area_or_more(monkeypatch):
    monkeypatch.setattr(augment, "RANDOM_AUGMENT", lambda image: image)
    monkeypatch.setattr(augment, "FLIP", lambda image: image)
    paper = PaperAugmentation(40, 0)
    for number in range(50):
        cropped = array(paper({"image": ramp()}, number)["image"])
        width, height = np.ptp(cropped[20, :, 0]) + 1, np.ptp(cropped[:, 20, 1]) + 1
        assert 0.45 * 40 * 40 < width * height <= 41 * 41


def test_there_are_the_ten_operations():
    assert len(OPERATIONS) == 10
    image = Image.fromarray((array(noise_image(1)) // 4 + 60).astype(np.uint8))  # dull, so that contrast can rise
    assert array(OPERATIONS["identity"](image)).tolist() == array(image).tolist()
    for name, operation in OPERATIONS.items():
        signs = 2 if name.split()[0] in ("shear", "translate", "rotate") else 1
        assert len(outcomes(operation, image)) == signs, name
        assert (operation(image).tobytes() == image.tobytes()) == (name == "identity"), name


def test_brightness_is_by_hand():
    flat = Image.new("RGB", (4, 4), (100, 50, 200))
    assert OPERATIONS["brightness"](flat).getpixel((0, 0)) == (136, 68, 255)  # × 1.36


@pytest.mark.parametrize(("name", "axis"), [("translate x", 1), ("translate y", 0)])
def test_translations_move_by_seven_pixels_over_grey(name, axis):
    image = array(noise_image(2))
    grey = np.full_like(np.take(image, range(7), axis), 128)
    down = np.concatenate([grey, np.take(image, range(25), axis)], axis)
    up = np.concatenate([np.take(image, range(7, 32), axis), grey], axis)
    found = [array(moved).tolist() for moved in outcomes(OPERATIONS[name], noise_image(2)).values()]
    assert sorted(found) == sorted([down.tolist(), up.tolist()])


@pytest.mark.parametrize(("name", "channel"), [("shear x", 0), ("shear y", 1)])
def test_shears_keep_the_corner_and_move_by_a_fifth(name, channel):
    """Entry (row r, column c) of a horizontal shear is that at column c ± 0.21 r."""
    image = ramp()
    shifts = []
    for moved in outcomes(OPERATIONS[name], image).values():
        pixels = array(moved)
        across, along = (10, 20) if channel == 0 else (20, 10)  # row, column with room on both sides
        shifts.append(pixels[across, along, channel] - array(image)[across, along, channel])
    assert sorted(shifts) == pytest.approx([-2.1, 2.1], abs=1)


def test_rotations_are_by_21_degrees():
    image = Image.new("RGB", (41, 41))
    image.putpixel((40, 20), (255, 255, 255))
    for moved in outcomes(OPERATIONS["rotate"], image).values():
        pixels = array(moved)[..., 0].astype(float)
        pixels[(pixels == 128)] = 0
        row = int(pixels.max(1).argmax())
        assert abs(abs(row - 20) - 20 * np.sin(np.radians(21))) < 1.1
