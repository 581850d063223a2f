"""Image files to pictures: the one place where they are opened, which formats are read, and how pixels become RGB."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from vlprune import escapes
from vlprune.config import ConfigError
from vlprune.data.images import FORMATS, open_regular

MAX_PIXELS = 89_478_485  # width × height; as RGB, which Pillow holds at 4 bytes a pixel, a third of a GiB
# What says nothing of the image that is opened: a disk, the network or the machine fails.
FAILURES = {
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENODEV, errno.ETIMEDOUT),
    *(errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH),
}
# Modes that Pillow converts to RGB as they are meant; the alpha channel is left out, the background shows.
CONVERTED = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))
DEEP_GREY = frozenset(("I", "I;16", "I;16B", "I;16L"))
UPRIGHT = {  # {orientation of EXIF: what turns the picture upright}
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIGNED, WHITE_IS_ZERO = 2, 0  # values of TIFF's tags SampleFormat and PhotometricInterpretation


class UnreadableImage(ValueError):
    """An image that is missing, of no known format, damaged or too large, or whose pixels are no colours."""


def open_image(image: Mapping[str, Any]) -> Image.Image:
    """The upright RGB image of {where, path} or, encoded, {where, bytes}.

    The formats are FORMATS, however the file is called; of an animation, the first picture. Grey of 9 to 32 bits keeps
    its 8 highest bits, as Pillow does with colours of 16 bits; other pixels than whole numbers without sign, and LAB,
    are refused. A picture is turned as its EXIF orientation says, because whoever captioned it or asked about it saw it
    so; torchvision and the official code of BLIP and X-VLM leave it lying. Pictures of 8 bits without an orientation
    are those of Pillow's `convert("RGB")`, bit by bit.

    Raises:
        UnreadableImage: with the annotation that names the image.
        OSError: a disk, network or machine that fails (FAILURES), which says nothing of the image.
        ConfigError: $VLPRUNE_MAX_PIXELS is no number.
    """
    encoded, limit = image.get("bytes"), max_pixels()
    if (Image.MAX_IMAGE_PIXELS or limit) < limit:  # Pillow's own limit in this process
        Image.MAX_IMAGE_PIXELS = limit
    try:
        with (
            open_regular(image["path"] or "") if encoded is None else io.BytesIO(encoded) as file,
            Image.open(file, formats=tuple(FORMATS)) as opened,
        ):
            width, height = opened.size
            if width * height > limit:
                raise ValueError(f"it has {width} × {height} pixels, more than {limit:,} ($VLPRUNE_MAX_PIXELS)")
            opened.load()
            return _upright(_rgb(opened), opened)
    except MemoryError:
        raise OSError(errno.ENOMEM, f"{image['where']}: {os.strerror(errno.ENOMEM)}", image["path"]) from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        if isinstance(error, OSError) and error.errno in FAILURES:
            raise OSError(error.errno, f"{image['where']}: {os.strerror(error.errno)}", image["path"]) from error
        is_none = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}" if is_none else escapes.reason(error)
        path = escapes.terminal(image["path"] or "")
        raise UnreadableImage(f"{image['where']}: cannot read image {path}: {reason}") from None


def max_pixels() -> int:
    """The most pixels that an image may have: $VLPRUNE_MAX_PIXELS, else MAX_PIXELS.

    A variable of the environment, as $VLPRUNE_CACHE, because it is about the machine's memory, and so that it holds in
    all worker and loader processes.

    Raises:
        ConfigError: it is no whole number above 0.
    """
    given = os.environ.get("VLPRUNE_MAX_PIXELS", str(MAX_PIXELS))
    if not (given.isascii() and given.isdecimal() and 0 < len(given.lstrip("0")) < 19):
        raise ConfigError(f"VLPRUNE_MAX_PIXELS must be a whole number above 0 and below 10^18, got {given!r}")
    return int(given)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_GREY:
        return _grey(image).convert("RGB")
    if image.mode not in CONVERTED:
        kind = {"F": "floating-point numbers", "LAB": "LAB colours"}.get(image.mode, f"of mode {image.mode}")
        raise ValueError(f"its pixels are {kind}; wanted grey, RGB, CMYK, YCbCr or a palette, of whole numbers")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """The 8 highest bits of grey of more."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.SAMPLEFORMAT, (0,))[0] == SIGNED:
        raise ValueError("its pixels are whole numbers with a sign; wanted such without")
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    deep = np.asarray(image)
    grey = ((deep.view(np.uint32) if deep.dtype == np.int32 else deep) >> (bits - 8)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey)


def _upright(picture: Image.Image, opened: Image.Image) -> Image.Image:
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF beside whole pixels, which then lie as they lie
        return picture
    # Pillow has turned a TIFF already, and its EXIF has no orientation any more.
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
