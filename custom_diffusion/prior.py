"""Class images: those that `retrieve.py` fetched, or generated from the class prompt."""

import hashlib
import os
import uuid
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from custom_diffusion.concepts import Concept, find_pictures
from custom_diffusion.data import PRIOR, random_stream
from custom_diffusion.files import whole_file
from custom_diffusion.interruption import RunStopped, StopSignals
from custom_diffusion.models import ModelSource, read_text_encoder
from custom_diffusion.retrieval.folder import read_class_folder


def class_images(concept: Concept, num_class_images: int, real_prior: bool) -> list[tuple[Path, str]]:
    """The first `num_class_images` (picture path, caption) of a concept."""
    if real_prior:
        return read_class_folder(concept.class_data_dir)[:num_class_images]
    return [(path, concept.class_prompt) for path in find_pictures(concept.class_data_dir)[:num_class_images]]


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

    A picture depends on the seed and its number, not on which process draws it or when. Machines that do not share the
    folder draw all of the pictures each. The model's whole pipeline is in memory for the duration.

    Raises:
        RunStopped: a signal came; the pictures drawn so far stay, and the next run goes on from there.
    """
    missing = missing_pictures(concepts, num_class_images)
    accelerator.wait_for_everyone()  # all have counted before the first picture appears
    rank, count = accelerator.process_index, accelerator.num_processes
    if not _folders_are_shared(accelerator, {concept.class_data_dir for concept in concepts}):
        rank, count = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = share_of(missing, batch_size, rank, count)
    if own:
        _generate(accelerator, source, own, dtype, seed, signals)
    accelerator.wait_for_everyone()


def missing_pictures(concepts: list[Concept], num_class_images: int) -> list[tuple[Concept, int, int]]:
    """What to draw, as (concept, number of its folder, index of the picture); existing pictures keep their places."""
    missing = []
    by_folder = {concept.class_data_dir: concept for concept in reversed(concepts)}  # concepts may share a class
    for number, concept in enumerate(by_folder.values()):
        existing = find_pictures(concept.class_data_dir) if concept.class_data_dir.is_dir() else []
        taken = {path.name.split("-")[0] for path in existing}
        free = (index for index in range(num_class_images + len(existing)) if str(index) not in taken)
        missing += [(concept, number, next(free)) for _ in range(num_class_images - len(existing))]
    return missing


def share_of(missing: list, batch_size: int, rank: int, count: int) -> list[list]:
    """The batches of process `rank` of `count`. They are dealt out whole, so that each is the same for any `count`."""
    return [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)][rank::count]


def _folders_are_shared(accelerator, folders):
    """Whether every process sees what the main process writes there."""
    name = [f".shared-{uuid.uuid4().hex}"]
    broadcast_object_list(name)
    markers = [folder / name[0] for folder in folders]
    if accelerator.is_main_process:
        for marker in markers:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    accelerator.wait_for_everyone()
    seen = all(marker.exists() for marker in markers)
    seen_by_all = accelerator.gather(torch.tensor([seen], device=accelerator.device)).all().item()
    if accelerator.is_main_process:
        for marker in markers:
            marker.unlink()
    return seen_by_all


def _generate(accelerator, source, batches, dtype, seed, signals):
    """Draw the pictures of batches of (concept, concept number, index)."""
    pipeline = DiffusionPipeline.from_pretrained(
        source.path,
        torch_dtype=dtype,
        safety_checker=None,
        revision=source.revision,
        variant=source.variant,
        text_encoder=read_text_encoder(source).to(dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    bar = tqdm(batches, desc="Generating class images", disable=not accelerator.is_local_main_process)
    for batch in bar:
        if signals.received:
            raise RunStopped(
                "stopped by a signal while class images were generated; those in place stay. To go on, repeat the command",
                status=128 + signals.received,
            )
        images = pipeline(
            [concept.class_prompt for concept, _, _ in batch],
            generator=[
                torch.Generator().manual_seed(int(random_stream(seed, PRIOR, number, index).integers(2**63)))
                for _, number, index in batch
            ],
        ).images
        for (concept, _, index), image in zip(batch, images):
            digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
            concept.class_data_dir.mkdir(parents=True, exist_ok=True)
            with whole_file(concept.class_data_dir / f"{index}-{digest}.jpg") as path:
                image.save(path, format="JPEG")
    del pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
