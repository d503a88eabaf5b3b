"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder that can also be drawn from.

`checkpoint-N/` holds the trained weights in the formats of `weights/format.py`, `training_state.pt` (optimizer, schedule, gradient
scaler) and `checkpoint.json` (step, position, settings of the run, and a checksum of every file). No random state: what is
random follows from the position.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.files import (
    MANIFEST_NAME,
    STATE_NAME,
    checkpoint_path,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    remove_folder,
    whole_folder,
)
from custom_diffusion.training.settings import check_resumable
from custom_diffusion.weights.format import ConceptWeights, read_weights, save_state, write_weights

logger = get_logger(__name__)


@dataclass
class Checkpoint:
    """A run at a step.

    Attributes:
        step: optimizer steps done. position: samples seen.
        weights: what has been learned so far.
        state: state dictionaries by name ("optimizer", "lr_scheduler", perhaps "scaler").
        settings: what the run's course depends on, to compare with the flags of the run that resumes it.
    """

    step: int
    position: int
    weights: ConceptWeights
    state: dict
    settings: dict


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint, unet, formats: tuple[str, ...]) -> Path:
    """Write `checkpoint-N`, whole or not at all. `unet` and `formats` as in `write_weights`."""
    path = checkpoint_path(output_dir, checkpoint.step)
    with whole_folder(path) as folder:
        write_weights(folder, checkpoint.weights, unet, formats)
        save_state(checkpoint.state, folder / STATE_NAME)
        manifest = {
            "step": checkpoint.step,
            "position": checkpoint.position,
            "settings": checkpoint.settings,
            "files": {file.name: _checksum(file) for file in sorted(folder.iterdir())},
        }
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return path


def remove_old_checkpoints(newest: Path, limit: int | None, best: int | None = None) -> None:
    """Of `newest` and the checkpoints of earlier steps keep the `limit` last, or all with None, and that of step `best`.

    Folders that `save_checkpoint` did not write, and checkpoints of later steps, which another run left, are not touched.
    """
    if limit is None:
        return
    own = [path for path in list_checkpoints(newest.parent) if (path / MANIFEST_NAME).is_file()]
    for path in [path for path in own if checkpoint_step(path) <= checkpoint_step(newest)][:-limit]:
        if checkpoint_step(path) != best:
            remove_folder(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError, saying what is wrong with which file, if any file is missing or not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        checksums = dict(manifest["files"])
        step, position, settings = int(manifest["step"]), int(manifest["position"]), dict(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path / MANIFEST_NAME}' cannot be read ({error})") from None
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            raise ValueError(f"'{path / name}' is missing")
        if _checksum(path / name) != checksum:
            raise ValueError(f"'{path / name}' is damaged")
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types
        raise ValueError(f"'{path / STATE_NAME}' cannot be read ({first_line(error)})") from None
    return Checkpoint(step, position, read_weights(path), state, settings)


def read_latest_checkpoint(output_dir: Path, warn) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none at all; `warn(line)` is called for each newer one.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    try:
        paths = list_checkpoints(output_dir)
    except OSError as error:
        raise ValueError(f"'{output_dir}' cannot be read ({error.strerror}); try again when it can") from None
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except (ValueError, OSError) as error:
            warn(f"skipping damaged checkpoint '{path.name}' of step {checkpoint_step(path)}: {error}")
    if paths:
        raise ValueError(
            f"none of the checkpoints in '{output_dir}' can be read ({', '.join(path.name for path in paths)}); try again "
            "if the disk was away, else leave the flag out and name another --output_dir"
        )
    return None


def find_resume(accelerator: Accelerator, output_dir: Path, name: str | None, settings: dict) -> Checkpoint | None:
    """The checkpoint to resume from, as the main process finds it; None to start anew.

    Args:
        name: what `--resume_from_checkpoint` says: "latest", a checkpoint's name or path, or None.
        settings: of this run, to compare with the checkpoint's.
    Raises:
        InputError: the checkpoint is damaged, or its weights do not fit these flags.
    """
    if name is None:
        if there := list_checkpoints(output_dir):
            logger.warning(
                f"'{output_dir}' holds {there[-1].name} of an earlier run. This run starts anew; "
                "to go on with that one, repeat the command with --resume_from_checkpoint latest"
            )
        return None
    found = [None, None]  # checkpoint, problem; other machines may not see the folder
    if accelerator.is_main_process:
        try:
            if name == "latest":
                found[0] = read_latest_checkpoint(output_dir, logger.warning)
            elif path := find_checkpoint(output_dir, name):
                found[0] = read_checkpoint(path)
            else:
                raise ValueError(f"no checkpoint {name!r} in '{output_dir}'; give the path of its folder, or 'latest'")
            if found[0] is None:
                logger.info(f"No checkpoint in '{output_dir}' yet: starting a new run")
            else:
                check_resumable(found[0].settings, settings, logger.warning)
        except (ValueError, OSError) as error:
            found[1] = f"--resume_from_checkpoint: {error}"
    broadcast_object_list(found)
    checkpoint, problem = found
    if problem:
        raise InputError(problem)
    return checkpoint


def restore(stateful: dict, state: dict) -> None:
    """Load the state of optimizer, schedule and gradient scaler; rates and decays stay what the flags say."""
    optimizer, lr_scheduler = stateful["optimizer"], stateful["lr_scheduler"]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    rates = lr_scheduler.base_lrs
    for name in stateful.keys() & state.keys():  # only --mixed_precision fp16 has a scaler
        stateful[name].load_state_dict(state[name])
    lr_scheduler.base_lrs = rates
    for group, own, rate, factor in zip(optimizer.param_groups, options, rates, lr_scheduler.lr_lambdas):
        group.update(own | {"lr": rate * factor(lr_scheduler.last_epoch)})


def last_good(output_dir: Path) -> str:
    """How to go on from the newest whole checkpoint, as a sentence."""
    try:
        checkpoint = read_latest_checkpoint(output_dir, lambda _: None)  # whoever resumes will be warned
    except ValueError as error:
        return f"There is no checkpoint to go back to: {error}."
    if checkpoint is None:
        return "There is no checkpoint to go back to."
    return f"The last good checkpoint is checkpoint-{checkpoint.step}; repeat the command with --resume_from_checkpoint latest"


def _checksum(path):
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from None
    return digest.hexdigest()
