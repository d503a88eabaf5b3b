"""What images look like, to tell recompressed and resized copies of one image from different images.

Two images count as one when their difference hashes (dhash, 16 x 16, rows and columns) agree and no cell of a 16 x 16 colour
miniature differs much. Measured on photographs, renderings and both on white ground: JPEG at quality 30 to 95, WebP, GIF
and sizes from 0.4 to 2 stayed below both bounds, every pair of different images was above one of them. The discrete-cosine hash
separated these less well, and would bring SciPy.
"""

import base64
from typing import NamedTuple

import numpy as np
from PIL import Image

HASH_SIDE = 16
MAX_SHARE_OF_BITS = (
    0.25  # differing, of those set in either hash; copies of photos: up to 0.25, different ones from 0.5
)
MIN_BITS = 100  # set in either hash; fewer are an outline on flat ground, which different things share
MAX_CELL_DIFFERENCE = 20  # of 255; copies of photos: up to 20, different ones with like hashes from 21
CELLS = (16, 16)
NUM_BITS = np.array([number.bit_count() for number in range(256)], np.uint16)  # set in a byte


class Look(NamedTuple):
    """What an image looks like: its difference hash (512 bits) and its colour miniature (RGB bytes of `CELLS`)."""

    bits: int
    cells: bytes

    def to_json(self) -> list[str]:
        """For a journal."""
        return [f"{self.bits:x}", base64.b64encode(self.cells).decode()]

    @classmethod
    def from_json(cls, values: list[str]) -> "Look":
        """Raises ValueError or TypeError for what `to_json` did not write."""
        bits, cells = values
        return cls(int(bits, 16), base64.b64decode(cells))

    def is_copy_of(self, other: "Look") -> bool:
        """Whether both show one image."""
        either = (self.bits | other.bits).bit_count()
        return (
            either >= MIN_BITS
            and (self.bits ^ other.bits).bit_count() <= MAX_SHARE_OF_BITS * either
            and max(abs(a - b) for a, b in zip(self.cells, other.cells)) <= MAX_CELL_DIFFERENCE
        )


def look_of(image: Image.Image) -> Look:
    """Args: image: RGB."""
    import dhash

    # Averaging by a whole number first saves most of the time, and changes both measures less than a JPEG does.
    image = image.reduce(max(1, min(image.size) // 64))
    side = HASH_SIDE + 1
    grey = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    return Look(
        dhash.dhash_int(list(grey.tobytes()), HASH_SIDE), image.resize(CELLS, Image.Resampling.BILINEAR).tobytes()
    )


class Looks:
    """Looks seen, to ask whether a new one is a copy of any."""

    def __init__(self):
        self._looks = []
        self._bits = np.empty((64, 2 * HASH_SIDE**2 // 8), np.uint8)  # a row for each hash, and room for more

    def add(self, look: Look):
        """Remember a look."""
        number = len(self._looks)
        if number == len(self._bits):
            self._bits = np.concatenate([self._bits, np.empty_like(self._bits)])
        self._bits[number] = _bytes_of(look)
        self._looks.append(look)

    def has_copy_of(self, look: Look) -> bool:
        """Whether one that was seen is a copy."""
        differing = NUM_BITS[self._bits[: len(self._looks)] ^ _bytes_of(look)].sum(1)
        # One bound for all leaves few for the whole comparison.
        near = np.flatnonzero(differing <= MAX_SHARE_OF_BITS * 2 * HASH_SIDE**2)
        return any(look.is_copy_of(self._looks[number]) for number in near)


def _bytes_of(look):
    return np.frombuffer(look.bits.to_bytes(2 * HASH_SIDE**2 // 8, "big"), np.uint8)
