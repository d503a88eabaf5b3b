"""Images that scores are taken of: drawn once, each with a note of how, and found again by whoever goes on later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.evaluation.prompts import MOST_IMAGES
from custom_diffusion.files import recover, whole_file
from custom_diffusion.model.inpainting import all_hole
from custom_diffusion.model.loading import load_pipeline
from custom_diffusion.model.source import ModelSource
from custom_diffusion.weights.format import ConceptWeights

NOTE = "custom-diffusion"  # the PNG's text chunk that says how it was drawn


@dataclass(frozen=True)
class Wanted:
    """An image file, and what makes it what it is, which its note must say."""

    path: Path
    note: dict


@dataclass(frozen=True)
class Drawing:
    """How every image is drawn. `resolution`: side in pixels, None for the model's."""

    model: str
    revision: str | None
    variant: str | None
    precision: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int | None

    def plan(
        self, folder: Path, digest: str, seed: int, name: str, prompts: Sequence[str], num_images: int
    ) -> list[Wanted]:
        """`<folder>/<name><prompt>-<index>.png`, prompt by prompt. `digest`: of the weights.

        The noise is that of seed + 1000 prompt + index: another for each image, and the same for all weights.
        """
        return [
            Wanted(
                folder / f"{name}{number:03}-{index}.png",
                {"prompt": prompt, "seed": seed + MOST_IMAGES * number + index, "weights": digest, **asdict(self)},
            )
            for number, prompt in enumerate(prompts)
            for index in range(num_images)
        ]


def weights_digest(weights: ConceptWeights | None) -> str:
    """Tells trained weights, wherever they lie; "base" for none."""
    if weights is None:
        return "base"
    digest = hashlib.sha256()
    parts = weights.tensors | weights.tokens
    for name, delta in weights.deltas.items():
        parts |= {f"{name}.up": delta.up, f"{name}.down": delta.down}
    for name in sorted(parts):
        digest.update(name.encode())
        digest.update(parts[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def undrawn(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those that are not there yet.

    Raises:
        InputError: a file that is there was drawn otherwise, or cannot be read. Nothing that is there is ever replaced.
    """
    missing = []
    for image in wanted:
        if not image.path.exists():
            missing.append(image)
        elif differences := _differences(image):
            raise InputError(f"--output: '{image.path}' {differences[0]}; name another folder, or evaluate as before")
    return missing


def _differences(image):
    """What the note of a file that is there says otherwise."""
    try:
        with Image.open(image.path) as file:
            note = json.loads(file.info[NOTE])
            file.load()
    except KeyError:
        return ["was not drawn by this tool"]
    except Exception as error:  # Pillow raises many types on damaged files
        raise InputError(
            f"--output: '{image.path}' cannot be read ({first_line(error)}); remove it, and it is drawn again"
        ) from None
    return [
        f"was drawn with {k} {note.get(k)!r}, not {value!r}" for k, value in image.note.items() if note.get(k) != value
    ]


def open_pipeline(source: ModelSource, dtype: torch.dtype) -> DiffusionPipeline:
    """The base model on the CPU, drawing by DDPM, as the published scores do. Raises InputError if it cannot be loaded."""
    # A safety checker would black images out, and the scores would say that the concept was not learned.
    pipe = load_pipeline(source, dtype, safety_checker=None)
    # Latents have no bounds; not every model's settings say so.
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, image: Wanted) -> None:
    """Draw one image and write it with its note."""
    note = image.note
    size = note["resolution"]
    drawn = pipe(
        note["prompt"],
        num_inference_steps=note["num_inference_steps"],
        guidance_scale=note["guidance_scale"],
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(note["seed"]),  # on the CPU: the same noise whatever the device
        **all_hole(pipe, size, size),
    ).images[0]
    text = PngInfo()
    text.add_itxt(NOTE, json.dumps(note))
    with whole_file(image.path) as temporary:
        drawn.save(temporary, format="PNG", pnginfo=text)


def open_folder(folder: Path) -> None:
    """Make the folder, and remove what a run that was killed left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
