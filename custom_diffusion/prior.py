"""Class images: those that `retrieve.py` fetched, or generated from the class prompt."""

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from custom_diffusion.args import InputError
from custom_diffusion.concepts import Concept, find_pictures
from custom_diffusion.data import PRIOR, random_stream
from custom_diffusion.models import ModelSource
from custom_diffusion.retrieval.folder import read_class_folder
from custom_diffusion.weights import whole_file


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
) -> None:
    """Draw what is missing to `num_class_images` in every concept's class folder, each by one of the processes.

    A picture depends on the seed and its number, not on which process draws it or when. The model's whole pipeline is in
    memory for the duration.

    Raises:
        InputError: afterwards a process does not see all images, since the folder is not shared.
    """
    missing = []
    by_folder = {concept.class_data_dir: concept for concept in reversed(concepts)}  # concepts may share a class
    for number, concept in enumerate(by_folder.values()):
        existing = find_pictures(concept.class_data_dir) if concept.class_data_dir.is_dir() else []
        taken = {path.name.split("-")[0] for path in existing}
        free = (index for index in range(num_class_images + len(existing)) if str(index) not in taken)
        missing += [(concept, number, next(free)) for _ in range(num_class_images - len(existing))]
    accelerator.wait_for_everyone()  # all have counted before the first picture appears
    if missing:
        with accelerator.split_between_processes(missing) as own:
            if own:
                _generate(accelerator, source, own, batch_size, dtype, seed)
        accelerator.wait_for_everyone()
    for concept in concepts:
        seen = len(find_pictures(concept.class_data_dir))
        if seen < num_class_images:
            raise InputError(
                f"{concept.name('class_data_dir')}: process {accelerator.process_index} sees {seen} of {num_class_images} "
                f"class images in '{concept.class_data_dir}'; with several machines the folder must be on a shared disk"
            )


def _generate(accelerator, source, wanted, batch_size, dtype, seed):
    """Draw the pictures of `wanted`, (concept, concept number, index) each."""
    pipeline = DiffusionPipeline.from_pretrained(
        source.path, torch_dtype=dtype, safety_checker=None, revision=source.revision, variant=source.variant
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    bar = tqdm(total=len(wanted), desc="Generating class images", disable=not accelerator.is_local_main_process)
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
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
        bar.update(len(batch))
    bar.close()
    del pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
