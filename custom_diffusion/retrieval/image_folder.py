"""A folder of images on the user's disk as rows, with captions beside them or none."""

from collections.abc import Iterator
from pathlib import Path

from custom_diffusion.images import IMAGE_SUFFIXES
from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.hub import signature
from custom_diffusion.retrieval.tables import KINDS_BY_SUFFIX, RowsBatch


class ImageFolder:
    """A folder of images, with a `.txt` of the same name beside each, or without any.

    Attributes:
        name: its path.
        signature: changes when an image or a caption is added, removed or changed.
        has_captions: whether there are captions.
    """

    def __init__(self, folder: Path, images: list[Path]):
        self.name = str(folder)
        self._images = images
        captions = [path.with_suffix(".txt") for path in images if path.with_suffix(".txt").is_file()]
        self.has_captions = bool(captions)
        self._of_class = {}
        self.signature = [signature(str(path)) for path in (*images, *captions)]

    def batches(self, row: int, offset: int) -> Iterator[RowsBatch]:
        """One batch for each image, from a row on; `text` is None where there is no caption."""
        for number, path in enumerate(self._images[row:], start=row):
            caption = path.with_suffix(".txt")
            text = caption.read_text(encoding="utf-8", errors="replace") if caption.is_file() else None
            yield RowsBatch(number, [{"image": str(path), "text": text}])

    def is_of_class(self, batch: RowsBatch, wanted: ClassWords) -> bool:
        """Whether an image without caption shows the class: all do, unless one of the folders is named after it."""
        key = (wanted.prompt, wanted.also)
        if key not in self._of_class:
            folders = {path.parent for path in self._images}
            self._of_class[key] = {f for f in folders if wanted.matches(" ".join(f.relative_to(self.name).parts))}
        named = self._of_class[key]
        return not named or Path(batch.rows[0]["image"]).parent in named


def find_image_folder(folder: Path) -> ImageFolder | None:
    """The folder's images, or None when it is none of images alone: then `datasets` or a table's reader knows it.

    Raises:
        SourceError: images without captions lie beside tables, which may have them.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(path.stem == "metadata" for path in files):
        return None
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        return None
    tables = [path for path in files if path.suffix.lower() in KINDS_BY_SUFFIX]
    found = ImageFolder(folder, images)
    if tables and not found.has_captions:
        raise SourceError(
            f"--dataset: {folder} has images without captions, and beside them {tables[0]}; give that file as --dataset if it "
            f"has the captions, else move it away"
        )
    return found
