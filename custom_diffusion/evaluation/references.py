"""The images that scores are measured against: the concept's photos, and real images of its class. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.errors import InputError
from custom_diffusion.images import find_images


def find_photos(folder: str | Path) -> list[Path]:
    """The concept's photos. Raises InputError if there are none."""
    return _images("--photos", folder)


def find_class_images(folder: str | Path) -> list[tuple[Path, str | None]]:
    """Real images of the class, with their captions where the folder has lists of them, as `retrieve.py` writes them.

    Raises:
        InputError: there are fewer than two, or lists that do not belong to the images.
    """
    try:
        listed = read_class_folder(Path(folder))
    except ValueError as error:
        raise InputError(f"--class_images: {error}") from None
    found = listed or [(path, None) for path in _images("--class_images", folder)]
    if len(found) < 2:
        raise InputError(f"--class_images: one image in folder '{folder}'; two or more are needed, better hundreds")
    return found


def _images(flag, folder):
    try:
        found = find_images(Path(folder))
    except OSError as error:
        raise InputError(f"{flag}: folder '{folder}' cannot be read ({error.strerror}); name one with images") from None
    if not found:
        raise InputError(f"{flag}: no image in folder '{folder}'; put some there, or name another folder")
    return found
