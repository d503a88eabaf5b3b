# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Does the small model follow captions that training never showed? `python demo/check_model.py` writes model_scores.json."""

import argparse
import json
from pathlib import Path

import world
from diffusers import StableDiffusionPipeline
from judge import score_captions

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "model_scores.json")
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    specs = world.held_out_specs()
    scores = {
        "num_captions": len(specs),
        "seed": args.seed,
        "percent_right": score_captions(pipeline, specs, args.seed),
    }
    print(json.dumps(scores))
    args.output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
