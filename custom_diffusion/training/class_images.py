"""Class images: those that `retrieve.py` fetched, or generated from the class prompt."""

import hashlib
import os
import uuid
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.cli.concepts import Concept
from custom_diffusion.files import whole_file
from custom_diffusion.images import find_images
from custom_diffusion.model.inpainting import all_hole
from custom_diffusion.model.loading import load_pipeline
from custom_diffusion.model.source import ModelSource
from custom_diffusion.progress import ProgressBar
from custom_diffusion.training.samples import PRIOR, random_stream
from custom_diffusion.training.stopping import RunStopped, StopSignals, lost_process_told

GO_ON = "the images in place stay. To go on, repeat the command"


def class_images(concept: Concept, num_class_images: int, real_prior: bool) -> list[tuple[Path, str]]:
    """The first `num_class_images` (image path, caption) of a concept."""
    return _all_class_images(concept, real_prior)[:num_class_images]


def held_out_class_images(concept: Concept, num_class_images: int, real_prior: bool) -> list[tuple[Path, str]]:
    """The (image path, caption) of a concept that training does not show: those beyond the first `num_class_images`."""
    return _all_class_images(concept, real_prior)[num_class_images:]


def _all_class_images(concept, real_prior):
    if real_prior:
        return read_class_folder(concept.class_data_dir)
    return [(path, concept.class_prompt) for path in find_images(concept.class_data_dir)]


@lost_process_told(GO_ON)
def generate_class_images(
    accelerator: Accelerator,
    source: ModelSource,
    concepts: list[Concept],
    *,
    num_class_images: int,
    batch_size: int,
    dtype: torch.dtype,
    seed: int,
    signals: StopSignals,
) -> None:
    """Draw what is missing to `num_class_images` in every concept's class folder, each by one of the processes.

    An image depends on the seed and its number, not on which process draws it or when. Machines that do not share the
    folder draw all of the images each. Where nothing is missing, nothing is written. The model's whole pipeline is in memory
    for the duration.

    Raises:
        RunStopped: in all processes, if one of them received a signal, could not write or died; the images drawn so far
            stay, and the next run goes on from there.
    """
    missing = missing_images(concepts, num_class_images)
    missing_somewhere = _any_process(accelerator, bool(missing))  # all have counted before the first image appears
    if not missing_somewhere:
        return
    rank, count = accelerator.process_index, accelerator.num_processes
    if not _folders_are_shared(accelerator, {concept.class_data_dir for concept, _, _ in missing}):
        rank, count = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shares = [share_of(missing, batch_size, index, count) for index in range(count)]
    own, num_rounds = shares[rank], _largest(accelerator, max(map(len, shares)))
    pipeline = _load_pipeline(accelerator, source, dtype) if own else None
    with signals.remembered():
        for index in ProgressBar(
            range(num_rounds), desc="Generating class images", disable=not accelerator.is_local_main_process
        ):
            problem = None
            if index < len(own) and not signals.received:
                problem = _draw(pipeline, own[index], seed)
            # All stop together: nobody waits for hours for one that has ended.
            _stop_together(accelerator, signals.received, problem)
    del pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def missing_images(concepts: list[Concept], num_class_images: int) -> list[tuple[Concept, int, int]]:
    """What to draw, as (concept, number of its folder, index of the image); existing images keep their places."""
    missing = []
    by_folder = {concept.class_data_dir: concept for concept in reversed(concepts)}  # concepts may share a class
    for number, concept in enumerate(by_folder.values()):
        existing = find_images(concept.class_data_dir) if concept.class_data_dir.is_dir() else []
        taken = {path.name.split("-")[0] for path in existing}
        free = (index for index in range(num_class_images + len(existing)) if str(index) not in taken)
        missing += [(concept, number, next(free)) for _ in range(num_class_images - len(existing))]
    return missing


def share_of(missing: list, batch_size: int, rank: int, count: int) -> list[list]:
    """The batches of process `rank` of `count`. They are dealt out whole, so that each is the same for any `count`."""
    return [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)][rank::count]


def _largest(accelerator, number):
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def _any_process(accelerator, value):
    return bool(_largest(accelerator, int(value)))


def _folders_are_shared(accelerator, folders):
    """Whether every process sees what the main process writes into these folders. Without any, the others' are elsewhere."""
    name = [f".shared-{uuid.uuid4().hex}"]
    broadcast_object_list(name)
    markers = [folder / name[0] for folder in folders]
    if accelerator.is_main_process:
        for marker in markers:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    accelerator.wait_for_everyone()
    unseen = not markers or not all(marker.exists() for marker in markers)
    shared = not _any_process(accelerator, unseen)
    if accelerator.is_main_process:
        for marker in markers:
            marker.unlink()
    return shared


def _load_pipeline(accelerator, source, dtype) -> DiffusionPipeline:
    pipeline = load_pipeline(source, dtype, safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device)


def _draw(pipeline, batch, seed):
    """Draw a batch of (concept, concept number, index); returns why it could not be written, or None."""
    images = pipeline(
        [concept.class_prompt for concept, _, _ in batch],
        generator=[
            torch.Generator().manual_seed(int(random_stream(seed, PRIOR, number, index).integers(2**63)))
            for _, number, index in batch
        ],
        **all_hole(pipeline, count=len(batch)),
    ).images
    try:
        for (concept, _, index), image in zip(batch, images):
            digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
            concept.class_data_dir.mkdir(parents=True, exist_ok=True)
            with whole_file(concept.class_data_dir / f"{index}-{digest}.jpg") as path:
                image.save(path, format="JPEG")
    except OSError as error:
        return f"cannot write class images: {error}"
    return None


def _stop_together(accelerator, signal_number, problem):
    """Raises RunStopped in all processes if any of them has a signal or a problem."""
    signal_number, failed = _largest(accelerator, signal_number), _any_process(accelerator, problem is not None)
    if failed:
        raise RunStopped(f"{problem or 'another process cannot write class images'}; {GO_ON}")
    if signal_number:
        raise RunStopped(f"stopped by a signal while class images were generated; {GO_ON}", status=128 + signal_number)
