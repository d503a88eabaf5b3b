"""One evaluation: read and check everything, draw what is not drawn yet, score it, write the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from custom_diffusion.cli.tool_flags import check_prompts
from custom_diffusion.errors import InputError
from custom_diffusion.evaluation.drawing import Drawing, draw, open_folder, open_pipeline, undrawn
from custom_diffusion.evaluation.metrics import ImageEncoder, Scorer, TextEncoder, load_clip, load_dino
from custom_diffusion.evaluation.page import write_page
from custom_diffusion.evaluation.prompts import fill, read_prompts, without_tokens
from custom_diffusion.evaluation.references import find_class_images, find_photos
from custom_diffusion.evaluation.report import summary, write_results
from custom_diffusion.evaluation.subjects import common_base, read_subjects
from custom_diffusion.model.source import ModelSource, check_num_inference_steps, wherever_called_from
from custom_diffusion.progress import ProgressBar
from custom_diffusion.weights.format import ConceptWeights
from custom_diffusion.weights.pipeline import load_custom_diffusion, unload_custom_diffusion


class Models:
    """Models that are loaded when they are needed first, and kept: a benchmark scores with them again and again."""

    def __init__(self, clip_model: str, dino_model: str):
        self.clip_model, self.dino_model = clip_model, dino_model
        cpu = torch.device("cpu")
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else cpu
        self.precision = "fp16" if self.device.type == "cuda" else "fp32"
        self._encoders = None
        self._pipelines = {}

    def encoders(self) -> tuple[ImageEncoder, TextEncoder, ImageEncoder]:
        """CLIP's for images and texts, and DINO's. Raises InputError if one cannot be loaded."""
        if self._encoders is None:
            self._encoders = (*load_clip(self.clip_model, self.device), load_dino(self.dino_model, self.device))
        return self._encoders

    def scorer(self, photos: Sequence[Path], class_images: Sequence[Path]) -> Scorer:
        """What scores images against these files. Raises InputError if one cannot be decoded."""
        clip, text, dino = self.encoders()
        class_features = clip(class_images, "--class_images") if class_images else None
        return Scorer(clip, text, dino, clip(photos, "--photos"), dino(photos, "--photos"), class_features)

    def pipeline(self, source: ModelSource) -> DiffusionPipeline:
        """It, on the device; that of the last source is kept."""
        if source not in self._pipelines:
            dtype = torch.float16 if self.precision == "fp16" else torch.float32
            self._pipelines = {source: open_pipeline(source, dtype).to(self.device)}
        return self._pipelines[source]


def evaluate_subjects(
    models: Models,
    given: Sequence[ConceptWeights | str | Path],
    output: Path,
    *,
    photos: str | Path,
    prompts: str | Path,
    concept: str | None,
    with_base: bool,
    num_images: int,
    class_images: str | Path | None,
    seed: int,
    source: tuple[str | None, str | None, str | None, str | None],
    **settings,
) -> list[dict]:
    """As `custom_diffusion.evaluate`; `source`: its model, revision, variant and config_from, `settings`: the other fields of `Drawing`."""
    templates = [template for template in read_prompts(prompts) for _ in range(num_images)]
    photo_files = find_photos(photos)
    class_files, captions = _class_images(class_images, len(templates))
    subjects = read_subjects(given, concept, with_base)
    base = common_base(subjects, *source)
    check_num_inference_steps(base, settings["num_inference_steps"])
    drawing = Drawing(wherever_called_from(base.path), base.revision, base.variant, models.precision, **settings)
    plans, class_plans = [], []
    for subject in subjects:
        place = (output / "images" / subject.digest, subject.digest, seed)
        plans.append(drawing.plan(*place, "", _filled(templates[::num_images], subject), num_images))
        class_plans.append(drawing.plan(*place, "class-", subject.class_prompts(captions), 1))
    missing = [undrawn(plan + class_plan) for plan, class_plan in zip(plans, class_plans)]
    scorer = models.scorer(photo_files, class_files)
    if any(missing):
        _draw(models.pipeline(base), subjects, missing)
    rows = [_row(subject, plan, templates, scorer, output) for subject, plan in zip(subjects, plans)]
    for row, class_plan in zip(rows, class_plans):
        if class_plan:
            row |= scorer.forgetting([image.path for image in class_plan])
    told = {**asdict(drawing), "scheduler": "DDPM", "seed": seed, "prompts": str(prompts), "num_images": num_images}
    told |= {"photos": wherever_called_from(str(photos))}
    told |= {"class_images": None if class_images is None else wherever_called_from(str(class_images))}
    told |= {"num_photos": len(photo_files), "num_class_images": len(class_files) or None}
    told |= {"clip_model": models.clip_model, "dino_model": models.dino_model}
    write_results(output, told, rows)
    write_page(output, told, rows)
    return rows


def _filled(templates, subject):
    """The prompts with the subject's concept in them. A word like <new9> that it lacks would be drawn as noise."""
    check_prompts("--concept", [subject.concept], subject.tokens)
    prompts = [fill(template, subject.concept) for template in templates]
    check_prompts("--prompts", prompts, subject.tokens)
    return prompts


def _class_images(folder, count):
    """The real class images, and the captions, or None each, of `count` to draw. Without a folder, neither."""
    if folder is None:
        return [], []
    found = find_class_images(folder)
    if count < 2:
        raise InputError(
            "--class_images: forgetting is seen on two images or more; give more --prompts or --num_images"
        )
    return [path for path, _ in found], [found[number % len(found)][1] for number in range(count)]


def _draw(pipe, subjects, missing):
    """Draw what is missing of each subject; nothing, if the weights of any of them do not fit the model (InputError)."""
    for subject in subjects:
        _load(pipe, subject)
    with ProgressBar(total=sum(map(len, missing)), desc="Drawing", unit="image") as progress:
        for subject, images in zip(subjects, missing):
            if images:
                open_folder(images[0].path.parent)
                _load(pipe, subject)
            for image in images:
                if not image.path.exists():  # else the same weights were given twice
                    draw(pipe, image)
                progress.update()
    unload_custom_diffusion(pipe)


def _load(pipe, subject):
    """Let the pipeline be the subject."""
    if subject.weights is None:
        unload_custom_diffusion(pipe)
        return
    try:
        load_custom_diffusion(pipe, subject.weights)
    except ValueError as error:
        raise InputError(f"weights: '{subject.name}': {error}") from None


def _row(subject, plan, templates, scorer, output):
    """A subject's scores, as results.json has them. `templates`: of each image, its prompt with `{}`."""
    prompts = [image.note["prompt"] for image in plan]
    texts = [without_tokens(prompt, subject.tokens) for prompt in prompts]
    scores = scorer.image_scores([image.path for image in plan], texts)
    images = [
        {
            "file": image.path.relative_to(output).as_posix(),
            "template": template,
            "prompt": prompt,
            "text": text,
            **score,
        }
        for image, template, prompt, text, score in zip(plan, templates, prompts, texts, scores)
    ]
    told = {"weights": subject.name, "steps": subject.steps, "concept": subject.concept, "num_images": len(images)}
    return {**told, **summary(images), "images": images}
