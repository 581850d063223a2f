"""Which image files are opened, what becomes of their pixels, and what is refused by name."""

import io
import os
import socket
import stat
import struct
import zlib

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image, ImageCms

from vlprune.config import ConfigError
from vlprune.data import calibration_batches, data_fingerprint, left_out, load_pairs
from vlprune.data.decode import UnreadableImage, open_image
from vlprune.data.images import FORMATS

DEEP = np.array([[0x0000, 0x00FF, 0x0100, 0x7FFF], [0x8000, 0xFE00, 0xFF00, 0xFFFF]], np.uint16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))


def encoded(picture, form, **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def opened(content):
    """The picture of the bytes of a file."""
    return open_image({"bytes": content, "path": None, "where": "a.json, item 3"})


def tiff(values, bits, *, form=1, photometric=1):
    """An uncompressed little-endian TIFF of grey rows."""
    tags = [
        *((256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric)),
        *((273, 8 + 2 + 9 * 12 + 4), (277, 1), (279, values.nbytes), (339, form)),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    return head + bytes(4) + values.tobytes()


def grey(picture):
    pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        (form, mode)
        for form, modes in {
            "BMP": "1 L P RGB RGBA",
            "GIF": "1 L P RGB RGBA",
            "JPEG": "1 L RGB CMYK YCbCr",
            "PNG": "1 L LA P RGB RGBA",
            "PPM": "1 L RGB",
            "TIFF": "1 L LA P RGB RGBA CMYK YCbCr",
            "WEBP": "L RGB RGBA",
        }.items()
        for mode in modes.split()
    ],
)
def test_pictures_of_8_bits_are_those_of_pillow_bit_by_bit(form, mode):
    content = encoded(noise_image(1).convert(mode), form)
    found = opened(content)
    assert found.mode == "RGB"
    assert found.tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_keeps_the_higher_byte(form):
    assert (grey(opened(encoded(Image.fromarray(DEEP), form))) == DEEP >> 8).all()


def test_grey_and_colours_of_16_bits_come_out_alike():
    rows = b"".join(b"\0" + b"".join(struct.pack(">3H", v, v, v) for v in row) for row in DEEP.tolist())

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", DEEP.shape[1], DEEP.shape[0], 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (grey(opened(png)) == grey(opened(encoded(Image.fromarray(DEEP), "PNG")))).all()


def test_big_endian_and_inverted_grey_of_16_bits():
    big = encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF")
    assert big[:2] == b"MM"
    assert (grey(opened(big)) == DEEP >> 8).all()
    assert (grey(opened(tiff(DEEP, 16, photometric=0))) == 255 - (DEEP >> 8)).all()


def test_grey_of_12_and_of_32_bits_keeps_the_highest_8():
    packed = np.array([[0x12, 0x3F, 0xED]], np.uint8)  # 0x123 and 0xFED
    whole = tiff(packed, 12)
    at = whole.index(struct.pack("<HHII", 256, 4, 1, 3))
    assert grey(opened(whole[: at + 8] + struct.pack("<I", 2) + whole[at + 12 :])).tolist() == [[0x12, 0xFE]]
    values = np.array([[0, 0x00FFFFFF, 0x7F000000], [0x80000000, 0xFE000000, 0xFFFFFFFF]], np.uint32)
    assert grey(opened(tiff(values, 32))).tolist() == [[0, 0, 0x7F], [0x80, 0xFE, 0xFF]]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (tiff(DEEP.astype(np.int16), 16, form=2), "whole numbers with a sign"),
        (tiff(DEEP.astype(np.int32), 32, form=2), "whole numbers with a sign"),
        (tiff(DEEP.astype(np.float32), 32, form=3), "floating-point numbers"),
        (encoded(Image.fromarray(DEEP.astype(np.float32)), "PPM"), "floating-point numbers"),
    ],
)
def test_pixels_that_are_no_colours_are_refused_by_name(content, named):
    with pytest.raises(UnreadableImage, match=rf"^a.json, item 3: cannot read image : its pixels are {named}") as error:
        opened(content)
    assert "\n" not in str(error.value)


def test_lab_is_refused_by_name():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(noise_image(1), to_lab)
    with pytest.raises(UnreadableImage, match="its pixels are LAB colours; wanted grey, RGB, CMYK"):
        opened(encoded(lab, "TIFF"))


LYING = {  # {orientation of EXIF: how a camera lays down what people see}
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", LYING)
def test_pictures_are_turned_as_their_exif_says(form, orientation):
    seen = np.zeros((16, 24, 3), np.uint8)
    seen[:8, :8, 0] = seen[8:, 16:, 1] = 255  # red in the upper left, green in the lower right corner
    turn, exif = LYING[orientation], Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(seen)
    found = np.asarray(opened(encoded(upright if turn is None else upright.transpose(turn), form, exif=exif)))
    assert found.shape == seen.shape
    for inner in (np.s_[2:6, 2:6], np.s_[10:14, 18:22]):  # away from edges, which JPEG blurs
        assert np.abs(found[inner].astype(int) - seen[inner]).max() < 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("damage", [b"II*\0\xff\xff\xff\xff\x01", b"not a TIFF at all", b""])
def test_damaged_exif_harms_no_picture(damage):
    content = encoded(noise_image(1), "JPEG", exif=b"Exif\0\0" + damage)
    assert opened(content).tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_the_first_picture_of_an_animation_is_taken():
    content = encoded(noise_image(1), "WEBP", save_all=True, append_images=[noise_image(2)], lossless=True)
    assert opened(content).tobytes() == noise_image(1).tobytes()


@pytest.mark.parametrize("name", ["x.png", "x.eps"])
def test_a_format_that_is_not_listed_is_not_tried(name, tmp_path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, a program that reads and writes files."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (tmp_path / name).write_bytes(encoded(noise_image(1), "EPS"))
    for content in (None, (tmp_path / name).read_bytes()):
        with pytest.raises(UnreadableImage, match="it is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
            open_image({"path": str(tmp_path / name), "bytes": content, "where": "here"})


@pytest.fixture(params=["fifo", "socket", "device", "folder"])
def odd(request, dataset):
    """The path of the third training image, where something else than a file lies."""
    path = dataset / "images" / "0003.png"
    path.unlink()
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif request.param == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only an administrator makes devices")
    else:
        path.mkdir()
    return path


def test_what_is_no_regular_file_is_refused_at_once(odd):
    data = str(odd.parents[1])
    before = data_fingerprint(data)
    with pytest.raises((UnreadableImage, FileNotFoundError), match=r"dataset_small.json, images 2: .*0003.png"):
        load_pairs(data, "train", 3)[2]
    [line] = left_out(data, "pairs", "train")
    assert line.startswith("dataset_small.json, images 2: ")
    assert len(load_pairs(data, "train", skip_broken=True)) == 11
    odd.rmdir() if odd.is_dir() else odd.unlink()
    noise_image(3).save(odd)
    assert data_fingerprint(data) != before


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    content = encoded(noise_image(1, size=32), "PNG")
    monkeypatch.setenv("VLPRUNE_MAX_PIXELS", "1024")
    assert opened(content).size == (32, 32)
    monkeypatch.setenv("VLPRUNE_MAX_PIXELS", "1023")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"it has 32 × 32 pixels, more than 1,023 \(\$VLPRUNE_MAX_PIXELS\)"):
        opened(content)


def test_a_larger_limit_goes_before_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setenv("VLPRUNE_MAX_PIXELS", "1024")
    assert opened(encoded(noise_image(1), "PNG")).size == (32, 32)


@pytest.mark.parametrize("given", ["", "0", "-1", "1e9", "many", "²", "9" * 30])
def test_a_limit_that_is_no_number_is_no_matter_of_an_image(given, dataset, monkeypatch):
    class Model:
        uses_regions = False

    monkeypatch.setenv("VLPRUNE_MAX_PIXELS", given)
    for call in (
        lambda: load_pairs(str(dataset), "train")[0],
        lambda: load_pairs(str(dataset), "train", skip_broken=True),
        lambda: list(calibration_batches(str(dataset), Model(), n_batches=1, batch_size=2, seed=0, skip_broken=True)),
    ):
        with pytest.raises(ConfigError, match="VLPRUNE_MAX_PIXELS must be a whole number above 0"):
            call()


def test_every_listed_format_has_a_reader():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
