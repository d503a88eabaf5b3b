# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What merging and compressing cost, measured on the small model: `python experiments/merge_and_compress.py`.

For every seed: two concepts trained apart (a teal circle with an orange edge, a magenta square with a lime edge), merged; the first
compressed at several energies, and exported as LoRAs of several ranks. Prints tables of means with their standard errors, and
writes them with a plot: docs/merge_and_compress.json, docs/compression.png.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from concept import FATES, LOOKS, concept_score, pair_scores, places, scores
from judge import generate, likeness, see
from PIL import Image, ImageDraw

import demo
from custom_diffusion import load_custom_diffusion, unload_custom_diffusion
from custom_diffusion.files import DELTAS_NAME, WEIGHTS_NAME
from custom_diffusion.model.loading import base_tensors, empty_unet
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.export import LORA_FILE
from custom_diffusion.weights.format import ConceptWeights, read_weights, write_weights
from custom_diffusion.weights.low_rank import full_tensors

ENERGIES = ("0.1", "0.2", "0.4", "0.6", "0.8", "0.9")
LORAS = ("--rank 1", "--rank 2", "--rank 4", "--rank 8", "--share 0.99", "--share 1")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=12)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def tool(args: argparse.Namespace, output: Path, *command: str) -> Path:
    """The folder that a tool writes, written anew."""
    shutil.rmtree(output, ignore_errors=True)
    runs.run(
        "-m", "custom_diffusion", *command, "--model", str(args.model), "--output", str(output), threads=args.threads
    )
    return output


def average(args: argparse.Namespace, folders: list[Path], merged: Path, output: Path) -> Path:
    """What people do without the merge: the mean of the weights, with the tokens of the merged folder."""
    parts, source = [read_weights(folder) for folder in folders], ModelSource(str(args.model))
    base = base_tensors(source, parts[0].shapes())
    whole = [full_tensors(part, base) for part in parts]
    tensors = {name: torch.stack([tensors[name] for tensors in whole]).mean(0) for name in base}
    both = read_weights(merged)
    write_weights(output, ConceptWeights(tensors, both.tokens, both.config), empty_unet(source), ("bin",))
    return output


def measure_merge(args: argparse.Namespace, pipe, folders: dict[str, Path], seed: int, bases: dict) -> dict[str, dict]:
    """Scores by what the weights are: of both concepts by their names, of ordinary captions and of pairs."""
    captions = [str(runs.class_images(args.work_dir, name)) for name in LOOKS]
    output = args.work_dir / "merged" / f"seed-{seed}"
    merged = tool(args, output, "merge", *map(str, folders.values()), "--captions", *captions)
    averaged = average(args, list(folders.values()), merged, output.with_name(f"average-{seed}"))
    apart = [runs.scored(folders[name], seed, bases[name], args.model) for name in LOOKS]
    joint = runs.trained(args.work_dir, runs.JOINT, seed, args.steps, threads=args.threads, model=args.model)
    apart = [runs.scored(folders[name], seed, bases[name], args.model) for name in LOOKS]
    described = {name: base.prompt for name, base in bases.items()}
    rows = {
        "best description": {name: base.score for name, base in bases.items()} | in_pairs(pipe, described, seed),
        "apart": together(apart),
    }
    phrases = {name: f"{word} {name}" for name, word in runs.WORDS.items()}
    for label, weights in (("joint", joint), ("merged", merged), ("plain average", averaged)):
        load_custom_diffusion(pipe, weights)
        both = [scores(pipe, runs.WORDS[name], seed, bases[name]) for name in LOOKS]
        rows[label] = together(both) | in_pairs(pipe, phrases, seed)
        unload_custom_diffusion(pipe)
    return rows


def in_pairs(pipe, phrases: dict[str, str], seed: int) -> dict[str, float]:
    """Scores of images of both: of the worse of the two, and the shares of things kept, swapped and lost."""
    values = pair_scores(pipe, phrases, seed)
    return {key: values[key] for key in ("pair", *FATES)}


def together(both: list[dict[str, float]]) -> dict[str, float]:
    """Each concept's score by its name, and the means of what concerns both."""
    rest = {key: float(np.mean([one[key] for one in both])) for key in ("prior", "prior_class", "leakage")}
    return {name: one["concept"] for name, one in zip(LOOKS, both)} | rest


def measure_compression(args: argparse.Namespace, pipe, folder: Path, seed: int) -> dict[str, dict]:
    """Size and score by energy, the full weights last."""
    rows = {}
    for energy in ENERGIES:
        output = tool(args, folder.parent / f"energy-{energy}", "compress", str(folder), "--energy", energy)
        load_custom_diffusion(pipe, output)
        score = concept_score(pipe, "<new1> circle", "circle", seed)
        rows[energy] = {"bytes": (output / DELTAS_NAME).stat().st_size, "score": score}
        unload_custom_diffusion(pipe)
    load_custom_diffusion(pipe, folder)
    size = (folder / f"{WEIGHTS_NAME}.safetensors").stat().st_size
    rows["full weights"] = {"bytes": size, "score": concept_score(pipe, "<new1> circle", "circle", seed)}
    unload_custom_diffusion(pipe)
    return rows


def measure_lora(args: argparse.Namespace, pipe, folder: Path, seed: int) -> dict[str, dict]:
    """Difference from the full weights' images in grey levels, and score, of LoRAs that diffusers loads."""
    prompts = [f"photo of a <new1> circle {place}" for place in places(4)]
    load_custom_diffusion(pipe, folder)
    expected = generate(pipe, prompts, seed).astype(float)
    unload_custom_diffusion(pipe)
    rows = {}
    for flags in LORAS:
        output = folder.parent / f"lora{flags.replace(' ', '-')}"
        tool(args, output, "export", str(folder), "--to", "lora", *flags.split())
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
            "score": 100 * float(np.mean([likeness(see(image), LOOKS["circle"]) for image in images])),
        }
    return rows


def measure(args: argparse.Namespace, pipe, seed: int, bases: dict) -> dict[str, dict]:
    """All tables of one seed."""
    folders = {
        name: runs.trained(args.work_dir, name, seed, args.steps, threads=args.threads, model=args.model)
        for name in LOOKS
    }
    return {
        "merge": measure_merge(args, pipe, folders, seed, bases),
        "compress": measure_compression(args, pipe, folders["circle"], seed),
        "lora": measure_lora(args, pipe, folders["circle"], seed),
    }


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
    bases = runs.baselines.read(args.model)
    pipe = demo.load_pipeline(model=args.model.resolve())
    of_seeds = [
        runs.once(args.work_dir / "measured" / f"seed-{seed}.json", lambda seed=seed: measure(args, pipe, seed, bases))
        for seed in runs.seeds(args)
    ]
    results = {
        name: {label: runs.summary([one[name][label] for one in of_seeds]) for label in rows}
        for name, rows in of_seeds[0].items()
    }
    runs.write_json(args.docs / "merge_and_compress.json", results)
    plot(results["compress"], args.docs / "compression.png")
    for name, head in (("merge", "weights"), ("compress", "energy"), ("lora", "LoRA")):
        print("\n" + table(head, results[name]))


if __name__ == "__main__":
    main()
