"""What our files are called, and files and folders that appear whole or not at all: written beside, then renamed."""

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A trained folder. `weights/format.py` says what is in the files.
WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
DELTAS_NAME = "custom_diffusion_deltas.safetensors"
CONFIG_NAME = "custom_diffusion_config.json"
WEIGHTS_FILES = (
    f"{WEIGHTS_NAME}.safetensors",
    f"{WEIGHTS_NAME}.bin",
    DELTAS_NAME,
)  # any of them makes a trained folder
CARD_NAME = "README.md"
SAMPLES_DIR = "samples"
CURVE_IMAGE, CURVE_VALUES = "curve.png", "curve.json"
# What a checkpoint has beside them (`training/checkpoints.py`).
MANIFEST_NAME = "checkpoint.json"
STATE_NAME = "training_state.pt"
# A model in the diffusers layout, and a LoRA as diffusers writes and looks for it.
MODEL_INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

# Hidden names `.<name>.<random><suffix>`, of what is being written; complete, about to take its place; and to be replaced.
PART, READY, REPLACED = ".custom-diffusion-part", ".custom-diffusion-ready", ".custom-diffusion-replaced"
_RANDOM = "." + "[0-9a-f]" * 8
# What file systems without such a notion answer to chmod and fsync (CIFS, FUSE, Windows). The data is written all the same.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF)


def checkpoint_step(path: Path) -> int:
    """The optimizer step of `checkpoint-N`, or -1 if the name is no checkpoint's."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All `checkpoint-N` folders, oldest first. One that cannot be looked at counts: it is there.

    Raises:
        OSError: the folder is there, but cannot be listed. A `glob` would find nothing in it.
    """
    try:
        paths = list(output_dir.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((p for p in paths if checkpoint_step(p) >= 0 and not _is_file(p)), key=checkpoint_step)


def _is_file(path):
    try:
        return path.is_file()
    except OSError:
        return False


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint folder at the path `name`; a name without a folder is looked for in `output_dir` first."""
    path = Path(name)
    candidates = (output_dir / path, path) if path.name == name else (path,)
    return next((p for p in candidates if p.is_dir() and checkpoint_step(p.resolve()) >= 0), None)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an exception."""
    temporary = _hidden(path, PART)
    try:
        yield temporary
        sync(temporary)
        open_to_others(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it becomes `path` when the block ends without an exception.

    An earlier `path` stays until then. A process that dies while the two change places leaves both under hidden names, and
    `recover`, or whoever writes `path` next, puts the new one into its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover_places(path.parent, glob.escape(path.name))
    temporary = _hidden(path, PART)
    temporary.mkdir()
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
            open_to_others(part)
        if path.exists():
            replaced, ready = temporary.with_suffix(REPLACED), temporary.with_suffix(READY)
            temporary.replace(ready)
            path.replace(replaced)
            ready.replace(path)
            sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)  # what cannot go now, `recover` removes
        else:
            temporary.replace(path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen half removed under its own name."""
    doomed = _hidden(path, PART)
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Finish what a run left in its output folder that was killed while it wrote, replaced or removed something.

    Only names that this module makes are touched, and only where a run writes: another run's output folder may lie inside.
    """
    _recover_places(output_dir, "*")
    for part in [*output_dir.glob(f".*{PART}"), *(output_dir / SAMPLES_DIR).glob(f".*{PART}")]:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def is_recoverable(path: Path) -> bool:
    """Whether `recover` will put a folder there."""
    return bool(_out_of_place(path.parent, glob.escape(path.name)))


def _recover_places(folder, name):
    """Let the folders whose names match `name` be in their places again, the new one where there are two."""
    for hidden in _out_of_place(folder, name):
        path = _named_in(hidden)
        if path.exists():  # killed before the old one made room, or after the new one took its place
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.replace(path)


def _out_of_place(folder, name):
    """Whole folders under hidden names, new ones first."""
    return [path for suffix in (READY, REPLACED) for path in folder.glob(f".{name}{_RANDOM}{suffix}")]


def _hidden(path, suffix):
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")


def _named_in(hidden):
    """The path whose place `.<name>.<random><suffix>` is beside."""
    return hidden.with_name(hidden.name[1:].rsplit(".", 2)[0])


def open_to_others(path: Path) -> None:
    """The permissions that a new file or folder gets. tempfile and safetensors make ones that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    with _where_supported():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where its file system can say so."""
    with _where_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _where_supported():
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def can_hold(folder: Path, name: str) -> bool:
    """Whether the file system of `folder`, which need not exist yet, takes a file of this name.

    Raises:
        OSError: it takes none at all.
    """
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        _try_name(there, name)
    except OSError:  # which one it is differs: EINVAL, ENOENT, EILSEQ, ENAMETOOLONG, EPERM...
        _try_name(there, "name")
        return False
    return True


def _try_name(folder, name):
    path = _hidden(folder / name, PART)
    try:
        path.touch()
    finally:
        path.unlink(missing_ok=True)
