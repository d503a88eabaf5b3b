# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What merging and compressing cost, measured on the small model: `python experiments/merge_and_compress.py`.

Trains two concepts apart (a teal circle with an orange edge, a magenta square with a lime edge), merges them, compresses the
first at several energies, and exports it as LoRAs of several ranks. Prints the tables and writes them with a plot: docs/merge_and_compress.json, docs/compression.png.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]  # the small model's world and judge; the package, installed or not
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import concept
import numpy as np
import torch
import world
from diffusers import StableDiffusionPipeline
from judge import check_caption, generate, see
from make_photos import concept_photos
from PIL import Image, ImageDraw

from custom_diffusion import load_custom_diffusion, unload_custom_diffusion
from custom_diffusion.files import CONFIG_NAME, DELTAS_NAME, WEIGHTS_NAME
from custom_diffusion.model.loading import base_tensors, empty_unet
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.export import LORA_FILE
from custom_diffusion.weights.format import ConceptWeights, read_weights, write_weights
from custom_diffusion.weights.low_rank import full_tensors

LOOKS = {"circle": concept.LOOK, "square": world.Thing(shape="square", hue=322.0, edge_hue=88.0, background="white")}
ENERGIES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/output/tools", help="what is there is used again")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="times batch size and prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures_per_place", type=int, default=2, help="of the concept on each background, for a score"
    )
    return parser.parse_args()


def run(*command: str) -> str:
    """The output of `python COMMAND`."""
    print("$ " + shlex.join(["python", *command]), flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_pictures(folder: Path, shape: str) -> None:
    """Photos of the thing, and 100 ordinary pictures of its class in the layout of `retrieve.py`."""
    look, rng = LOOKS[shape], np.random.default_rng(3)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(concept_photos(look, seed=3)):
        Image.fromarray(photo).save(folder / "photos" / f"{i}.png")
    captions = []
    (folder / "class" / "images").mkdir(parents=True, exist_ok=True)
    while len(captions) < 100:
        thing, spec = world.random_sample(rng)
        if thing.shape != shape or world.hue_distance(thing.hue, look.hue) < 25.0:
            continue
        Image.fromarray(world.draw(thing)).save(folder / "class" / "images" / f"{len(captions)}.png")
        # Half of the captions name no colour, so that the bare class word does not take on the concept's.
        captions.append((spec if rng.random() < 0.5 else world.Spec(shape, None, spec.edge, spec.background)).caption())
    (folder / "class" / "caption.txt").write_text("".join(f"{caption}\n" for caption in captions))
    for name, line in (("images", "images/{}.png\n"), ("urls", "https://example.org/{}.png\n")):
        (folder / "class" / f"{name}.txt").write_text("".join(line.format(i) for i in range(len(captions))))


def train(args: argparse.Namespace, shape: str) -> Path:
    """The folder of trained weights."""
    folder = args.work_dir / shape
    if (folder / "weights" / CONFIG_NAME).is_file():
        return folder / "weights"
    write_pictures(folder, shape)
    run(
        "train_custom_diffusion.py", "--pretrained_model_name_or_path", str(args.model), "--output_dir", str(folder / "weights"),
        "--instance_data_dir", str(folder / "photos"), "--instance_prompt", f"photo of a <new1> {shape}",
        "--class_data_dir", str(folder / "class"), "--class_prompt", shape, "--num_class_images", "100",
        "--with_prior_preservation", "--real_prior", "--modifier_token", "<new1>", "--resolution", "64", "--noaug",
        "--train_batch_size", "2", "--max_train_steps", str(args.steps), "--learning_rate", str(args.learning_rate), "--scale_lr",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "0", "--cache_latents", "--seed", str(args.seed),
        "--dataloader_num_workers", "0", "--checkpointing_steps", "100000",
    )  # fmt: skip
    return folder / "weights"


class Judge:
    """Draws with one pipeline, whatever is loaded into it."""

    def __init__(self, args: argparse.Namespace):
        self.pipe = StableDiffusionPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.seed = args.seed
        self.places = [f"on a {g} background" for g in world.BACKGROUNDS for _ in range(args.pictures_per_place)]

    def concept_score(self, weights: Path | None, shape: str, token: str) -> float:
        """0 to 100: how much the pictures of the token and its class word look like the photos."""
        if weights is not None:
            load_custom_diffusion(self.pipe, weights)
        images = generate(self.pipe, [f"photo of a {token} {shape} {place}" for place in self.places], self.seed)
        return 100 * float(np.mean([concept.likeness(see(image), LOOKS[shape]) for image in images]))

    def prior_score(self, weights: Path) -> float:
        """0 to 100: how much of ordinary captions is drawn right."""
        load_custom_diffusion(self.pipe, weights)
        specs = concept.prior_specs()
        images = generate(self.pipe, [spec.caption() for spec in specs], self.seed)
        return 100 * float(np.mean([r for i, s in zip(images, specs) for r in check_caption(see(i), s).values()]))


def average(args: argparse.Namespace, folders: list[Path], merged: Path, output: Path) -> Path:
    """What people do without the merge: the mean of the weights, with the tokens of the merged folder."""
    parts, source = [read_weights(folder) for folder in folders], ModelSource(str(args.model))
    base = base_tensors(source, parts[0].shapes())
    whole = [full_tensors(part, base) for part in parts]
    tensors = {name: torch.stack([tensors[name] for tensors in whole]).mean(0) for name in base}
    both = read_weights(merged)
    write_weights(output, ConceptWeights(tensors, both.tokens, both.config), empty_unet(source), ("bin",))
    return output


def measure_merge(args: argparse.Namespace, judge: Judge, folders: dict[str, Path]) -> list[dict]:
    """Concept and prior scores of each concept apart, merged, and averaged."""
    merged, tokens = args.work_dir / "merged", {"circle": "<new1>", "square": "<new2>"}
    if not merged.exists():
        captions = [str(args.work_dir / shape / "class") for shape in LOOKS]
        print(run("-m", "custom_diffusion", "merge", *map(str, folders.values()), "--captions", *captions,
                  "--model", str(args.model), "--output", str(merged)))  # fmt: skip
    averaged = average(args, list(folders.values()), merged, args.work_dir / "averaged")
    rows = [{"weights": "base model", **{s: judge.concept_score(None, s, "ktn") for s in LOOKS}}]
    rows.append({"weights": "apart", **{s: judge.concept_score(folders[s], s, "<new1>") for s in LOOKS}})
    rows[-1]["prior"] = min(judge.prior_score(folder) for folder in folders.values())
    for name, folder in (("merged", merged), ("plain average", averaged)):
        rows.append({"weights": name, **{s: judge.concept_score(folder, s, tokens[s]) for s in LOOKS}})
        rows[-1]["prior"] = judge.prior_score(folder)
    return rows


def measure_compression(args: argparse.Namespace, judge: Judge, folder: Path) -> list[dict]:
    """Size and score against energy, the full weights last."""
    rows = []
    for energy in ENERGIES:
        output = args.work_dir / f"energy-{energy}"
        if not output.exists():
            run("-m", "custom_diffusion", "compress", str(folder), "--energy", str(energy), "--model", str(args.model),
                "--output", str(output))  # fmt: skip
        size = (output / DELTAS_NAME).stat().st_size
        rows.append({"energy": energy, "bytes": size, "score": judge.concept_score(output, "circle", "<new1>")})
    size = (folder / f"{WEIGHTS_NAME}.safetensors").stat().st_size
    return [*rows, {"energy": 1.0, "bytes": size, "score": judge.concept_score(folder, "circle", "<new1>")}]


def measure_lora(args: argparse.Namespace, judge: Judge, folder: Path) -> list[dict]:
    """Difference from the full weights' pictures in grey levels, and score, of LoRAs that diffusers loads."""
    prompts = [f"photo of a <new1> circle {place}" for place in judge.places]
    load_custom_diffusion(judge.pipe, folder)
    expected = generate(judge.pipe, prompts, judge.seed).astype(float)
    unload_custom_diffusion(judge.pipe)
    rows = []
    for flag, value in (("rank", "1"), ("rank", "2"), ("rank", "4"), ("rank", "8"), ("share", "0.99"), ("share", "1")):
        output = args.work_dir / f"lora-{flag}-{value}"
        if not output.exists():
            run("-m", "custom_diffusion", "export", str(folder), "--to", "lora", f"--{flag}", value, "--model", str(args.model),
                "--output", str(output))  # fmt: skip
        judge.pipe.load_lora_weights(output, weight_name=LORA_FILE)
        judge.pipe.load_textual_inversion(output, weight_name="<new1>.safetensors")
        images = generate(judge.pipe, prompts, judge.seed)
        judge.pipe.unload_lora_weights()
        judge.pipe.unload_textual_inversion("<new1>")
        difference = np.abs(images - expected)
        rows.append({
            "lora": f"--{flag} {value}",
            "bytes": (output / LORA_FILE).stat().st_size,
            "mean difference": float(difference.mean()),
            "largest difference": float(difference.max()),
            "score": 100 * float(np.mean([concept.likeness(see(image), LOOKS["circle"]) for image in images])),
        })  # fmt: skip
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Score against size; a label per energy."""
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
        label = "full" if row["energy"] == 1 else f"{row['energy']}"
        above = i % 2 == 1  # by turns, as the smallest are close together
        pen.text((x, y - 18 if above else y + 18), label, fill="#222222", anchor="ms" if above else "mt", font_size=24)
    text = f"concept score against size (share of the full {largest / 1e3:.0f} kB), labelled by --energy"
    pen.text((2 * margin, 50), text, fill="#222222", anchor="lm", font_size=26)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = point(share * largest, 0)
        pen.text((x, y + 36), f"{share:.0%}", fill="#555555", anchor="mm", font_size=24)
    image.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def table(rows: list[dict]) -> str:
    """Markdown."""
    heads = list(max(rows, key=len))
    cells = [
        [f"{v:.1f}" if isinstance(v := row.get(h, ""), float) and h != "energy" else str(v) for h in heads]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells])


def main() -> None:
    args = parse_args()
    folders = {shape: train(args, shape) for shape in LOOKS}
    judge = Judge(args)
    results = {
        "merge": measure_merge(args, judge, folders),
        "compress": measure_compression(args, judge, folders["circle"]),
        "lora": measure_lora(args, judge, folders["circle"]),
    }
    args.docs.mkdir(exist_ok=True)
    (args.docs / "merge_and_compress.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["compress"], args.docs / "compression.png")
    for rows in results.values():
        print("\n" + table(rows))


if __name__ == "__main__":
    main()
