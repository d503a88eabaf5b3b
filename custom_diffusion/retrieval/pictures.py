"""One downloaded file -> one class image: a JPEG that every reader decodes."""

import hashlib
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # of the encoded picture; more is taken for a decompression bomb
MAX_SIDE = 2048  # of the written JPEG; training resizes the shorter side to 512-1024
JPEG_QUALITY = 95
TOO_SMALL = "too small"


class Rejected(Exception):
    """A candidate is no usable class image; the message is a short reason to count by.

    `lasting` is False for reasons that may be gone tomorrow (a timeout, a server error).
    """

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.lasting = lasting


def to_class_image(encoded: bytes, min_size: int) -> tuple[bytes, str]:
    """Decode a picture fully and encode it as the JPEG to keep.

    EXIF-rotated, flattened on white to RGB, first frame of an animation, long side at most `MAX_SIDE`.

    Args:
        encoded: a file in any format Pillow reads.
        min_size: least shorter side, pixels, of what is kept.
    Returns:
        (JPEG file, hexadecimal SHA-256 of size and decoded RGB pixels).
    Raises:
        Rejected: not a picture, damaged, too big or too small.
    """
    try:
        with Image.open(BytesIO(encoded)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise Rejected("more pixels than allowed")
            if min(width, height) < min_size:
                raise Rejected(TOO_SMALL)
            # For JPEG: decode at 1/2, 1/4 or 1/8 size where that is still above the bound; all data is read all the same.
            opened.draft("RGB", (MAX_SIDE, MAX_SIDE))
            opened.load()
            picture = to_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError:
        raise Rejected("more pixels than allowed") from None
    except UnidentifiedImageError:
        raise Rejected("not a picture") from None
    except Rejected:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen kinds on damaged files
        raise Rejected("damaged picture") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if min(picture.size) < min_size:  # a banner whose long side had to be cut down
        raise Rejected(TOO_SMALL)
    fingerprint = pixel_hash(picture)
    jpeg = BytesIO()
    picture.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue(), fingerprint


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, transparency flattened on white, 16 bits scaled down rather than clipped."""
    if picture.mode == "F":
        raise Rejected("floating-point picture")  # no telling which value is white
    if picture.mode.startswith("I"):
        picture = picture.convert("I")
        # 16-bit grey opens as "I" or "I;16"; an "I" that stays within 8 bits is left alone.
        scale = 1 / 257 if picture.getextrema()[1] > 255 else 1
        picture = picture.point(lambda value: value * scale + 0.5).convert("L")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, mask=picture.getchannel("A"))
        return canvas
    return picture.convert("RGB")


def pixel_hash(picture: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels."""
    return hashlib.sha256(b"%dx%d:" % picture.size + picture.tobytes()).hexdigest()
