"""Which checkpoint folders there are. Apart from `checkpoints.py`, which needs torch, so that flags can be checked fast."""

import re
from pathlib import Path


def checkpoint_step(path: Path) -> int:
    """The optimizer step of `checkpoint-N`, or -1 if the name is no checkpoint's."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All `checkpoint-N` folders, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and checkpoint_step(p) >= 0]
    return sorted(found, key=checkpoint_step)


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint folder called `name` in `output_dir` (only the last part of a path counts), or at that path."""
    for path in (output_dir / Path(name).name, Path(name)):
        if path.is_dir() and checkpoint_step(path) >= 0:
            return path
    return None
