"""One downloaded file -> one class image: a JPEG that every reader decodes."""

import hashlib
import threading
import warnings
from contextlib import contextmanager
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from custom_diffusion.images import UnreadableImage, to_rgb
from custom_diffusion.retrieval.looks import Look, look_of

# What browsers show, and TIFF. Pillow knows more: it would start Ghostscript on an EPS file. A JPEG may turn out to be an MPO,
# several of them in one file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Most that Pillow and its libraries took per pixel of the file, as measured with 24 million pixels: the kinds of JPEG that
# come in passes are held whole, WebP is drawn on two canvases before it is copied.
BYTES_PER_PIXEL = {"WEBP": 20, "AVIF": 16}
OTHER_BYTES_PER_PIXEL = 11
JPEG_BYTES_PER_PIXEL = 3  # unless it comes in passes
MAX_DECODING_BYTES = 2**28  # for one image: 24 million pixels of PNG, 13 of WebP, 89 of a plain JPEG
ALL_DECODING_BYTES = 300_000_000  # for all that are decoded at a time
MAX_SIDE = 2048  # of the written JPEG; training resizes the shorter side to 512-1024
JPEG_QUALITY = 95
TOO_SMALL = "too small"
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bounds here are lower


class Rejected(Exception):
    """A candidate is no usable class image; the message is a short reason to count by.

    `lasting` is False for reasons that may be gone tomorrow (a timeout, a server error).
    """

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.lasting = lasting


def to_class_image(encoded: bytes, min_size: int) -> tuple[bytes, str, Look]:
    """Decode an image fully and encode it as the JPEG to keep.

    Turned upright, flattened on white to RGB, first frame of an animation, long side at most `MAX_SIDE`.

    Args:
        encoded: a file in one of `FORMATS`.
        min_size: least shorter side, pixels, of what is kept.
    Returns:
        (JPEG file, its hexadecimal SHA-256, which is the same for the same pixels; what it looks like).
    Raises:
        Rejected: not an image, damaged, too big or too small.
    """
    image = _decode(encoded, min_size)
    file = BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, exif=b"")
    jpeg = file.getvalue()
    return jpeg, hashlib.sha256(jpeg).hexdigest(), look_of(image)


def _decode(encoded, min_size):
    """The image as RGB, upright, its long side bounded."""
    try:
        with Image.open(BytesIO(encoded), formats=known_formats()) as opened:
            if min(opened.size) < min_size:
                raise Rejected(TOO_SMALL)
            with _memory_for(opened):
                image = to_rgb(_read_upright(opened))
                image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    except Image.DecompressionBombError:
        raise Rejected("more pixels than allowed") from None
    except UnidentifiedImageError:
        raise Rejected("not an image in a known format") from None
    except UnreadableImage as error:
        raise Rejected(str(error)) from None
    except Rejected:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen kinds on damaged files
        raise Rejected("damaged image") from error
    if min(image.size) < min_size:  # a banner whose long side had to be cut down
        raise Rejected(TOO_SMALL)
    return image


def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads; AVIF needs 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read_upright(opened):
    """All pixels of an open file, in its own mode; shrunk before any conversion, as those take several times the memory."""
    shrink = min(1, MAX_SIDE / max(opened.size))
    # JPEG: decoded at 1/2, 1/4 or 1/8 size where that is still above the bound; all data is read all the same.
    opened.draft("RGB", tuple(round(side * shrink) for side in opened.size))
    opened.load()
    if opened.mode in ("RGB", "RGBA", "L", "LA", "CMYK", "YCbCr"):  # palettes and deep greys cannot be averaged yet
        opened.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    ImageOps.exif_transpose(opened, in_place=True)
    return opened


_room = threading.Condition()
_decoding_bytes = 0  # of all images being decoded


@contextmanager
def _memory_for(opened):
    """Wait until an open file can be decoded beside the others within `ALL_DECODING_BYTES`.

    Raises:
        Rejected: it would take more than one image may.
    """
    global _decoding_bytes
    per_pixel = BYTES_PER_PIXEL.get(opened.format, OTHER_BYTES_PER_PIXEL)
    if opened.format in ("JPEG", "MPO") and not opened.info.get("progressive"):
        per_pixel = JPEG_BYTES_PER_PIXEL
    needed = opened.width * opened.height * per_pixel
    if needed > MAX_DECODING_BYTES:
        raise Rejected("more pixels than allowed")
    with _room:
        _room.wait_for(lambda: _decoding_bytes + needed <= ALL_DECODING_BYTES)
        _decoding_bytes += needed
    try:
        yield
    finally:
        with _room:
            _decoding_bytes -= needed
            _room.notify_all()
