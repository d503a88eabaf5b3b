"""CustomConcept101, the authors' benchmark: its concepts, a training command for each, and the scores that were published."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import custom_diffusion
from custom_diffusion.errors import InputError
from custom_diffusion.evaluation.report import align
from custom_diffusion.files import WEIGHTS_FILES
from custom_diffusion.images import find_images

DATASET_FILE = "dataset.json"
KEYS = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir", "prompt_filename")
MODEL = "CompVis/stable-diffusion-v1-4"
# CLIP-T, CLIP-I, DINO on single concepts with 50 DDPM steps. Source: customconcept101/README.md of the authors' repository.
PUBLISHED = {
    "Textual Inversion": (0.6117, 0.7530, 0.5128),
    "DreamBooth": (0.7514, 0.7521, 0.5541),
    "Custom Diffusion": (0.7583, 0.7456, 0.5335),
}
# As the authors advise for one GPU; and what was stopped is gone on with.
RECIPE = (
    "--with_prior_preservation", "--prior_loss_weight=1.0", "--num_class_images=200", "--train_batch_size=2",
    "--learning_rate=1e-5", "--scale_lr", "--lr_warmup_steps=0", "--max_train_steps=500", "--hflip",
    "--resume_from_checkpoint=latest",
)  # fmt: skip


@dataclass(frozen=True)
class BenchmarkConcept:
    """An entry of dataset.json. `class_name`: what the folder of its class images is called there."""

    name: str
    instance_prompt: str
    class_prompt: str
    class_name: str
    photos: Path
    prompts: Path


def read_customconcept101(data: str | Path) -> list[BenchmarkConcept]:
    """The concepts of the dataset's folder, which holds dataset.json, prompts/ and benchmark_dataset/.

    Raises:
        InputError: dataset.json cannot be read or used, or photos or prompts that it names are missing.
    """
    file = Path(data) / DATASET_FILE
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--data: '{file}' cannot be read ({error.strerror}); give the authors' customconcept101 folder"
        ) from None
    except ValueError as error:
        raise InputError(f"--data: '{file}' is not valid JSON ({error})") from None
    if not isinstance(entries, list) or not entries or not all(_is_entry(entry) for entry in entries):
        raise InputError(f"--data: '{file}' must be a list of concepts with {', '.join(KEYS)}")
    concepts = [
        BenchmarkConcept(
            Path(entry["instance_data_dir"]).name,
            entry["instance_prompt"],
            entry["class_prompt"],
            Path(entry["class_data_dir"]).name,
            Path(data) / entry["instance_data_dir"],
            Path(data) / entry["prompt_filename"],
        )
        for entry in entries
    ]
    for name, count in Counter(concept.name for concept in concepts).items():
        if count > 1:
            raise InputError(f"--data: two concepts are called {name!r}, as their folders in '{file}' are; rename one")
    for concept in concepts:
        if not concept.photos.is_dir() or not find_images(concept.photos):
            raise InputError(
                f"--data: no image in '{concept.photos}'; unpack the authors' benchmark_dataset.zip in '{data}'"
            )
        if not concept.prompts.is_file():
            raise InputError(f"--data: '{concept.prompts}' is missing; copy the authors' prompts folder into '{data}'")
    return concepts


def _is_entry(entry):
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) and entry[key] for key in KEYS)
        and re.search(r"<[\w-]+>", entry["instance_prompt"])
    )


def weights_folder(output: Path, concept: BenchmarkConcept) -> Path:
    return output / concept.name / "weights"


def is_trained(output: Path, concept: BenchmarkConcept) -> bool:
    return any((weights_folder(output, concept) / name).is_file() for name in WEIGHTS_FILES)


def training_command(concept: BenchmarkConcept, output: Path, model: str, flags: Sequence[str]) -> list[str]:
    """What follows `python` to train the concept; concepts of one class share their generated class images."""
    script = Path(custom_diffusion.__file__).resolve().parents[1] / "train_custom_diffusion.py"
    return [
        "-m", "accelerate.commands.launch", str(script), f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={concept.photos}", f"--instance_prompt={concept.instance_prompt}",
        f"--modifier_token={re.search(r'<[^<>]+>', concept.instance_prompt).group()}",
        f"--class_prompt={concept.class_prompt}", f"--class_data_dir={output / 'class_images' / concept.class_name}",
        f"--output_dir={weights_folder(output, concept)}", *RECIPE, *flags,
    ]  # fmt: skip


def train_concept(concept: BenchmarkConcept, command: Sequence[str]) -> None:
    """Run a training command. Raises InputError if it fails."""
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        raise InputError(f"--train: training '{concept.name}' ended with status {status}; its own lines above say why")


def comparison(rows: Sequence[dict], num_concepts: int) -> str:
    """Mean scores of the concepts' rows beside the published ones, with the standard error over concepts."""
    cells = [["method", "CLIP-T", "CLIP-I", "DINO"]]
    cells += [[f"{name} (published)", *(f"{value:.4f}" for value in values)] for name, values in PUBLISHED.items()]
    ours = []
    for score in ("clip_t", "clip_i", "dino"):
        values = [row[score] for row in rows]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        ours.append(f"{statistics.fmean(values):.4f}{error}")
    cells.append([f"here, {len(rows)} of {num_concepts} concepts", *ours])
    return align(cells)
