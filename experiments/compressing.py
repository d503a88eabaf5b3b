# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What compressing costs, measured on the small model: `python experiments/compressing.py`.

For every seed the teal circle with an orange edge, trained for itself, is compressed at several energies, and exported as LoRAs of
several ranks. Prints tables of means with their standard errors, and writes them with a plot: docs/compressing.json,
docs/compression.png.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import runs  # finds the demo
import torch
from concept import LOOKS, concept_score, places
from judge import generate, likeness, see
from PIL import Image, ImageDraw

import demo
from custom_diffusion import compress, export, load_custom_diffusion, unload_custom_diffusion
from custom_diffusion.files import DELTAS_NAME, WEIGHTS_NAME
from custom_diffusion.tools.export import LORA_FILE

CONCEPT = "circle"
ENERGIES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
LORAS = ({"rank": 1}, {"rank": 2}, {"rank": 4}, {"rank": 8}, {"share": 0.99}, {"share": 1})
IMAGES_PER_PLACE = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def measure_compression(pipe, folder: Path, seed: int, model: Path, work_dir: Path) -> dict[str, dict]:
    """Size and score by energy, the full weights last."""

    def score(weights):
        load_custom_diffusion(pipe, weights)
        value = concept_score(pipe, f"<new1> {CONCEPT}", CONCEPT, seed, IMAGES_PER_PLACE)
        unload_custom_diffusion(pipe)
        return value

    rows = {}
    for energy in ENERGIES:
        output = work_dir / f"energy-{energy}"
        compress(folder, output=output, energy=energy, model=str(model))
        rows[str(energy)] = {"bytes": (output / DELTAS_NAME).stat().st_size, "score": score(output)}
    rows["full weights"] = {"bytes": (folder / f"{WEIGHTS_NAME}.safetensors").stat().st_size, "score": score(folder)}
    return rows


def measure_lora(pipe, folder: Path, seed: int, model: Path, work_dir: Path) -> dict[str, dict]:
    """Difference from the full weights' images in grey levels, and score, of LoRAs that diffusers loads."""
    prompts = [f"photo of a <new1> {CONCEPT} {place}" for place in places(IMAGES_PER_PLACE)]
    load_custom_diffusion(pipe, folder)
    expected = generate(pipe, prompts, seed).astype(float)
    unload_custom_diffusion(pipe)
    rows = {}
    for options in LORAS:
        flags = " ".join(f"--{name} {value}" for name, value in options.items())
        output = work_dir / f"lora{flags.replace(' ', '-')}"
        export(folder, to="lora", output=output, model=str(model), **options)
        pipe.load_lora_weights(output, weight_name=LORA_FILE)
        pipe.load_textual_inversion(output, weight_name="<new1>.safetensors")
        images = generate(pipe, prompts, seed)
        pipe.unload_lora_weights()
        pipe.unload_textual_inversion("<new1>")
        difference = np.abs(images - expected)
        rows[flags] = {
            "bytes": (output / LORA_FILE).stat().st_size,
            "mean difference": float(difference.mean()),
            "largest difference": float(difference.max()),
            "score": 100 * float(np.mean([likeness(see(image), LOOKS[CONCEPT]) for image in images])),
        }
    return rows


def measure(args: argparse.Namespace, pipe, seed: int) -> dict[str, dict]:
    """Both tables of one seed."""
    folder = runs.trained(args.work_dir, CONCEPT, seed, args.steps, threads=args.threads, model=args.model)
    with TemporaryDirectory() as work_dir:
        given = (pipe, folder, seed, args.model, Path(work_dir))
        return {"compress": measure_compression(*given), "lora": measure_lora(*given)}


def plot(results: dict[str, dict], path: Path) -> None:
    """Score against size; a label per energy."""
    rows = [{"energy": energy, **{key: one["mean"] for key, one in row.items()}} for energy, row in results.items()]
    width, height, margin = 640, 360, 60
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    pen = ImageDraw.Draw(image)
    largest = max(row["bytes"] for row in rows)

    def point(size, score):
        x = margin + size / largest * (width - 2 * margin)
        return 2 * x, 2 * (height - margin - score / 100 * (height - 2 * margin))

    for score in range(0, 101, 20):
        pen.line([point(0, score), point(largest, score)], fill="#dddddd", width=2)
        pen.text((40, point(0, score)[1]), str(score), fill="#555555", anchor="lm", font_size=24)
    pen.line([point(row["bytes"], row["score"]) for row in rows], fill="#1f6f8b", width=5)
    for i, row in enumerate(rows):
        x, y = point(row["bytes"], row["score"])
        pen.ellipse([x - 9, y - 9, x + 9, y + 9], fill="#1f6f8b")
        label = row["energy"].removesuffix(" weights")
        above = i % 2 == 1  # by turns, as the smallest are close together
        pen.text((x, y - 18 if above else y + 18), label, fill="#222222", anchor="ms" if above else "mt", font_size=24)
    text = f"concept score against size (share of the full {largest / 1e3:.0f} kB), labelled by --energy"
    pen.text((2 * margin, 50), text, fill="#222222", anchor="lm", font_size=26)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = point(share * largest, 0)
        pen.text((x, y + 36), f"{share:.0%}", fill="#555555", anchor="mm", font_size=24)
    image.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def table(head: str, rows: dict[str, dict]) -> str:
    """Markdown."""
    keys = list(max(rows.values(), key=len))
    cells = [
        [label, *(runs.cell(row[key]["values"]) if key in row else "" for key in keys)] for label, row in rows.items()
    ]
    return runs.table([[head, *keys], *cells])


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    pipe = demo.load_pipeline(model=args.model.resolve())
    of_seeds = [
        runs.once(args.work_dir / "compressed" / f"seed-{seed}.json", lambda seed=seed: measure(args, pipe, seed))
        for seed in runs.seeds(args)
    ]
    results = {
        name: {label: runs.summary([one[name][label] for one in of_seeds]) for label in rows}
        for name, rows in of_seeds[0].items()
    }
    runs.write_json(args.docs / "compressing.json", results)
    plot(results["compress"], args.docs / "compression.png")
    for name, head in (("compress", "energy"), ("lora", "LoRA")):
        print("\n" + table(head, results[name]))


if __name__ == "__main__":
    main()
