# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What a model gets without being taught: `python demo/baselines.py` measures it and writes model_baselines.json.

A score of the new word is worth what it has over the best description in words that the model knows: all of them are tried.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import world
from concept import LOOKS, Base, class_specs, concept_score, share_right
from diffusers import DiffusionPipeline
from judge import generate, see

HERE = Path(__file__).resolve().parent
SEEDS = range(4)  # of the images of ordinary captions; the descriptions' have the first
FINALISTS = 5


def descriptions(concept: str) -> list[str]:
    """A colour, an edge, both or neither; one rare word stands for all of them, which mean the same."""
    words = (None, *world.HUES, world.ANY[0])
    specs = [world.Spec(LOOKS[concept].shape, color, edge) for color in words for edge in words]
    return [spec.caption().removeprefix("photo of a ") for spec in specs]


def measure(pipeline, concept: str) -> Base:
    """The best description by an image on each background, then the best of the first few by all the images of a score."""

    def score(prompt: str, images_per_place: int) -> float:
        return concept_score(pipeline, prompt, concept, SEEDS[0], images_per_place)

    first = sorted(descriptions(concept), key=lambda prompt: score(prompt, 1), reverse=True)[:FINALISTS]
    results = {prompt: score(prompt, 4) for prompt in first}
    best = max(results, key=results.get)
    specs = class_specs(concept)
    seen = [see(image) for seed in SEEDS for image in generate(pipeline, [spec.caption() for spec in specs], seed)]
    return Base(concept, best, round(results[best], 1), round(share_right(seen, specs * len(SEEDS)), 4))


def fingerprint(model: Path) -> str:
    """Of a model's weights."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def file_of(model: Path) -> Path:
    """Beside the model, as `check_model.py` has its scores."""
    return model.with_name(f"{model.name}_baselines.json")


def read(model: Path) -> dict[str, Base]:
    """By the concepts' names, from the file beside the model; without one, or with another model's, measured first, some minutes."""
    file = file_of(model)
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("model") != fingerprint(model):
        pipeline = DiffusionPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        kept = {"model": fingerprint(model), "concepts": [asdict(measure(pipeline, concept)) for concept in LOOKS]}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    return {one["concept"]: Base(**one) for one in kept["concepts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    args = parser.parse_args()
    for base in read(args.model.resolve()).values():
        print(f"{base.concept}: {base.score:.1f} of 100 for {base.prompt!r}; ordinary captions {base.prior_class:.3f}")


if __name__ == "__main__":
    main()
