"""Checkpoints: everything a run needs to go on as if it had never stopped, in a folder that can also be drawn from.

`checkpoint-N/` holds the trained weights in the formats of `weights.py`, `training_state.pt` (optimizer, schedule, gradient
scaler) and `checkpoint.json` (step, position, settings of the run, and a checksum of every file). No random state: what is
random follows from the position.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from custom_diffusion.args import InputError
from custom_diffusion.checkpoint_names import checkpoint_step, find_checkpoint, list_checkpoints
from custom_diffusion.files import PART, save_state, whole_folder
from custom_diffusion.settings import check_resumable
from custom_diffusion.weights import ConceptWeights, read_weights, write_weights

logger = get_logger(__name__)
MANIFEST_NAME = "checkpoint.json"
STATE_NAME = "training_state.pt"


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
    path = output_dir / f"checkpoint-{checkpoint.step}"
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


def remove_old_checkpoints(newest: Path, limit: int | None) -> None:
    """Of `newest` and the checkpoints of earlier steps keep the `limit` last, or all with None.

    Folders that `save_checkpoint` did not write, and checkpoints of later steps, which another run left, are not touched.
    """
    if limit is None:
        return
    own = [path for path in list_checkpoints(newest.parent) if (path / MANIFEST_NAME).is_file()]
    for path in [path for path in own if checkpoint_step(path) <= checkpoint_step(newest)][:-limit]:
        # Out of sight first: a checkpoint that is half removed must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}{PART}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed)


def remove_parts(output_dir: Path) -> None:
    """Remove what a run left that was killed while it wrote or removed something."""
    for path in [*output_dir.glob(f".*{PART}"), *output_dir.glob(f"*/.*{PART}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
        raise ValueError(f"'{path / STATE_NAME}' cannot be read ({str(error).splitlines()[0]})") from None
    return Checkpoint(step, position, read_weights(path), state, settings)


def read_latest_checkpoint(output_dir: Path, warn) -> Checkpoint | None:
    """The newest checkpoint that is whole; `warn(line)` is called for each newer one that is not."""
    for path in reversed(list_checkpoints(output_dir)):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            warn(f"skipping damaged checkpoint '{path.name}' of step {checkpoint_step(path)}: {error}")
    return None


def find_resume(accelerator: Accelerator, args: argparse.Namespace, settings: dict) -> Checkpoint | None:
    """The checkpoint to resume from, as the main process finds it; None to start anew.

    Raises:
        InputError: the checkpoint is damaged, or its weights do not fit these flags.
    """
    if args.resume_from_checkpoint is None:
        if there := list_checkpoints(Path(args.output_dir)):
            logger.warning(
                f"'{args.output_dir}' holds {there[-1].name} of an earlier run. This run starts anew; "
                "to go on with that one, repeat the command with --resume_from_checkpoint latest"
            )
        return None
    found = [None, None]  # checkpoint, problem; other machines may not see the folder
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        try:
            if args.resume_from_checkpoint == "latest":
                found[0] = read_latest_checkpoint(output_dir, logger.warning)
            else:
                found[0] = read_checkpoint(find_checkpoint(output_dir, args.resume_from_checkpoint))
            if found[0] is None:
                logger.info(f"No checkpoint in '{output_dir}' yet: starting a new run")
            else:
                check_resumable(found[0].settings, settings, logger.warning)
        except ValueError as error:
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
    checkpoint = read_latest_checkpoint(output_dir, logger.warning)
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
