"""Image files: which ones there are, and how any of them becomes pixels.

Training, its checks and retrieval all read images by this module, so that all of them see the same pixels.
"""

from pathlib import Path

from PIL import Image, ImageOps

# What people call images; a file with such a name that does not decode is an error, any other file is passed over.
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif"
}  # fmt: skip


def find_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden and other files are passed over."""
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and _looks_like_image(p))


def _looks_like_image(path):
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow's readers raise many types on foreign bytes; whatever it is, it is no image
        return False


def open_image(path: Path) -> Image.Image:
    """The image, decoded, upright as its EXIF says, as `to_rgb` makes it. Raises what Pillow raises, and ValueError."""
    with Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency flattened on white, 16 bits scaled down rather than clipped.

    Raises:
        ValueError: floating-point values, of which nobody can tell which is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point image")
    if image.mode.startswith("I"):
        image = image.convert("I")
        # 16-bit grey opens as "I" or "I;16"; an "I" that stays within 8 bits is left alone.
        scale = 1 / 257 if image.getextrema()[1] > 255 else 1
        image = image.point(lambda value: value * scale + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")
