"""Files and folders that appear whole or not at all: written beside, then renamed."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PART = ".part"  # ends the hidden names of what is being written or removed


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an exception."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    os.close(handle)
    temporary = Path(temporary)
    try:
        yield temporary
        sync(temporary)
        open_to_others(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(path: Path) -> None:
    """The permissions that a new file or folder gets. tempfile and safetensors make ones that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it becomes `path` when the block ends without an exception.

    An earlier `path` stays until then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART))
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
            open_to_others(part)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART))
            path.replace(replaced)
            temporary.replace(path)
            shutil.rmtree(replaced)
        else:
            temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_state(state: dict, path: Path) -> None:
    """`torch.save`. Raises OSError if the file cannot be written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())
