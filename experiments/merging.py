# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What merging keeps of concepts, and of all else, measured on the small model: `python experiments/merging.py`.

For every seed: two concepts (a teal circle with an orange edge, a magenta square with a lime edge) trained apart, and in one run;
those trained apart merged by `custom_diffusion merge`, by the paper's equations as its authors apply them, and by a plain average.
Prints the table of means with their standard errors, and writes docs/merging.json.
"""

import argparse
import json
import shutil
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
import world
from baselines import read as read_baselines
from concept import FATES, LOOKS, Base, class_specs, pair_scores, places, rescaled_prior, share_right
from diffusers import DDPMScheduler
from judge import generate, likeness, see

import demo
from custom_diffusion import load_custom_diffusion, merge, unload_custom_diffusion
from custom_diffusion.model.loading import base_tensors, empty_unet, load_text
from custom_diffusion.model.source import ModelSource
from custom_diffusion.model.text_encoders import TextEncoders
from custom_diffusion.model.text_features import add_tokens, position_weights, text_features
from custom_diffusion.weights.format import ConceptWeights, read_weights, write_weights
from custom_diffusion.weights.least_squares import report
from custom_diffusion.weights.low_rank import full_tensors

SENTENCES = ("photo of a {}", "a photo of {}", "{}", "a {}")
TIMESTEPS = (200, 450, 700, 900)
OTHER_SENTENCES = SENTENCES[1:]  # than those of training


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def trained(args: argparse.Namespace, concept: str, seed: int) -> Path:
    """`runs.trained` as the flags say."""
    return runs.trained(args.work_dir, concept, seed, args.steps, threads=args.threads, model=args.model)


def write_other(
    args: argparse.Namespace, tensors: dict[str, torch.Tensor], merged: ConceptWeights, output: Path
) -> Path:
    """A folder with these matrices and the tokens of the merged one."""
    unet = empty_unet(ModelSource(str(args.model)))
    write_weights(output, ConceptWeights(tensors, merged.tokens, merged.config), unet, ("bin",))
    return output


def authors_solution(
    text: TextEncoders, base: dict[str, torch.Tensor], parts: list[dict], captions: list[str]
) -> dict[str, torch.Tensor]:
    """Equations 4 and 5 as the authors' script applies them.

    Exact in "<new1> circle" and "a photo of <new1> circle", from the first word to the end token; the regularisation is 200
    captions without padding and without a ridge, each from the first word, or from the one behind "photo of a".
    """

    def rows(prompts):
        ids, features = text_features(text, prompts)
        ends = (ids == text.tokenizers[0].eos_token_id).int().argmax(1) + 1
        starts = [4 if "photo of a" in prompt[:15] else 1 for prompt in prompts]
        return torch.cat([one[start:end] for one, start, end in zip(features, starts, ends)])

    ordinary = rows(captions[:200])
    constraints, owner = [], []
    for number, name in enumerate(LOOKS):
        for row in rows([f"{runs.WORDS[name]} {name}", f"a photo of {runs.WORDS[name]} {name}"]):
            if all((row - other).abs().mean() > 0 for other in constraints):
                constraints.append(row)
                owner.append(number)
    c = torch.stack(constraints)
    d = torch.linalg.solve(ordinary.T @ ordinary, c.T).T
    solution = {}
    for name, matrix in base.items():
        targets = torch.stack([row @ parts[number][name].double().T for row, number in zip(c, owner)])
        errors = targets.T - matrix.double() @ c.T
        solution[name] = (matrix.double() + errors @ torch.linalg.solve(d @ c.T, d)).float()
    return solution


def merged_folders(args: argparse.Namespace, folders: dict[str, Path], seed: int) -> dict[str, Path]:
    """By the way in which they were merged, from concepts trained apart; what each has lost in the text lies beside it."""
    output = args.work_dir / "merging" / f"seed-{seed}"
    labels = ("merged", "authors", "average")
    if all((output / f"{label}.json").is_file() for label in labels):
        return {label: output / label for label in labels}
    shutil.rmtree(output, ignore_errors=True)
    captions = [runs.class_images(args.work_dir, name) for name in LOOKS]
    merge(list(folders.values()), captions=captions, model=str(args.model), output=output / "merged")
    merged, source = read_weights(output / "merged"), ModelSource(str(args.model))
    parts = [read_weights(folder) for folder in folders.values()]
    base, text = base_tensors(source, parts[0].shapes()), load_text(source, torch.device("cpu"))
    add_tokens(text, merged.tokens)
    whole = [full_tensors(part, base) for part in parts]
    lines = [line for folder in captions for line in (folder / "caption.txt").read_text().splitlines()]
    write_other(args, authors_solution(text, base, whole, lines), merged, output / "authors")
    average = {name: torch.stack([tensors[name] for tensors in whole]).mean(0) for name in base}
    write_other(args, average, merged, output / "average")
    for label in labels:
        runs.write_json(output / f"{label}.json", lost(text, base, whole, read_weights(output / label).tensors))
    return {label: output / label for label in labels}


def lost(text: TextEncoders, base: dict[str, torch.Tensor], parts: list[dict], merged: dict) -> dict[str, float]:
    """Shares of the trained change, in the new words and all after them: means over matrices and concepts.

    Returns:
        in the prompt of training, in other sentences, with a background behind either, and in the padding of all these.
    """
    kinds = {
        "prompt": SENTENCES[:1],
        "other sentences": OTHER_SENTENCES,
        "background": [
            f"{sentence} on a {ground} background" for ground in world.BACKGROUNDS for sentence in SENTENCES
        ],
    }
    shares = {}
    for part, (name, word) in zip(parts, runs.WORDS.items()):
        for kind, sentences in kinds.items():
            ids, features = text_features(text, [sentence.format(f"{word} {name}") for sentence in sentences])
            own = torch.tensor(text.tokenizers[0].convert_tokens_to_ids([word]))
            weights = position_weights(ids, text.tokenizers[0].eos_token_id, own)
            for place, where in ((kind, weights == 1), ("padding", (weights > 0) & (weights < 1))):
                moments = features[where].T @ features[where]
                told = [report(merged[n], base[n], [part[n]], [moments], moments).lost[0] for n in base]
                shares.setdefault(f"lost, {place}", []).append(float(np.mean(told)))
    return {place: float(np.mean(values)) for place, values in shares.items()}


def measure(pipe, words: dict[str, str], seed: int) -> dict[str, float]:
    """Scores of what the pipeline has loaded, by its words for the concepts.

    Returns:
        of each concept: its score, 0 to 100, by its name; the same in sentences that training never showed; leakage; and the share
        of its class's captions (half of them, by turns with the seed) that is drawn right, 0 to 1.
    """
    row = {}
    for name, word in words.items():
        specs = class_specs(name)[seed % 2 :: 2]
        others = [f"{sentence} {place}" for sentence, place in zip(cycle(OTHER_SENTENCES), places(2))]
        prompts = {
            name: [f"photo of a {word} {name} {place}" for place in places(2)],
            f"{name}, other sentences": [sentence.format(f"{word} {name}") for sentence in others],
            f"{name}, leakage": [f"photo of a {name} {place}" for place in places(1)],
            f"{name}, class": [spec.caption() for spec in specs],
        }
        images = iter(generate(pipe, [prompt for some in prompts.values() for prompt in some], seed))
        seen = {key: [see(image) for image in islice(images, len(some))] for key, some in prompts.items()}
        row |= {key: 100 * float(np.mean([likeness(one, LOOKS[name]) for one in some])) for key, some in seen.items()}
        row[f"{name}, class"] = share_right(seen[f"{name}, class"], specs)
    return row


def row_of(
    kept: dict[str, float], apart: dict[str, float], before: dict[str, float], bases: dict[str, Base]
) -> dict[str, float]:
    """A row of the table: both concepts' scores, then the means over them of what else was measured.

    Args:
        kept: what was measured of some weights. apart: of the concepts trained apart. before: the losses of the untrained model.
    """
    row = {name: kept[name] for name in LOOKS} | {
        key: kept[key] for name in LOOKS if (key := f"{name}, other sentences") in kept
    }
    row["prior_class"] = float(np.mean([rescaled_prior(kept[f"{name}, class"], bases[name]) for name in LOOKS]))
    row["leakage"] = float(np.mean([kept[f"{name}, leakage"] for name in LOOKS]))
    for name in LOOKS:
        gain = before[name] - kept[f"{name}, loss"]
        row[f"{name}, gain kept"] = 100 * gain / (before[name] - apart[f"{name}, loss"])
    for kind in ("pair", "captions"):
        if f"{kind}, loss" in kept:
            row[f"{kind}, loss"] = 100 * (kept[f"{kind}, loss"] / before[kind] - 1)
    return row | {key: value for key, value in kept.items() if key.startswith(("pairs: ", "lost, "))}


def in_pairs(pipe, phrases: dict[str, str], seed: int) -> dict[str, float]:
    """Scores of images of both: of the worse of the two, and the shares of things kept, swapped and lost."""
    values = pair_scores(pipe, phrases, seed, images_per_place=2)
    return {f"pairs: {key}": values[key] for key in ("pair", *FATES)}


def true_images(seed: int) -> dict[str, tuple[list[str], list[np.ndarray]]]:
    """Captions and images of each concept, of both side by side, and of ordinary things, on every background."""
    rng, found = np.random.default_rng(seed), {}
    for name, look in LOOKS.items():
        captions = [f"{sentence} on a {ground} background" for ground in world.BACKGROUNDS for sentence in SENTENCES]
        things = [
            replace(look, background=ground, **world.random_pose(rng))
            for ground in world.BACKGROUNDS
            for _ in SENTENCES
        ]
        phrase = "{" + name + "} " + name
        found[name] = [caption.format(phrase) for caption in captions], [world.draw(thing) for thing in things]
    captions, images = [], []
    for i, ground in enumerate([*world.BACKGROUNDS] * 4):
        order = [*LOOKS] if i % 2 == 0 else [*LOOKS][::-1]
        both = (replace(LOOKS[name], background=ground) for name in order)
        images.append(world.draw(*world.side_by_side(*both, rng)))
        captions.append(
            "photo of " + " and ".join("a {" + name + "} " + name for name in order) + f" on a {ground} background"
        )
    found["pair"] = captions, images
    samples = [world.random_sample(rng) for _ in range(36)]
    found["captions"] = [spec.caption() for _, spec in samples], [world.draw(thing) for thing, _ in samples]
    return found


@torch.no_grad()
def losses(pipe, words: dict[str, str], seed: int) -> dict[str, float]:
    """Mean squared error of what the UNet predicts for noised true images, by what they show; the same noise for all weights."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    random, row = torch.Generator().manual_seed(seed), {}
    for kind, (captions, images) in true_images(seed).items():
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        errors = []
        for timestep in TIMESTEPS:
            noise, at = torch.randn(latents.shape, generator=random), torch.full((len(latents),), timestep)
            if not all(name in words for name in LOOKS if any("{" + name + "}" in caption for caption in captions)):
                continue
            features, _ = pipe.encode_prompt([c.format(**words) for c in captions], "cpu", 1, False)
            predicted = pipe.unet(scheduler.add_noise(latents, noise, at), at, encoder_hidden_states=features).sample
            errors.append((predicted - scheduler.get_velocity(latents, noise, at)).square().mean().item())
        if errors:
            row[kind] = float(np.mean(errors))
    return row


def of_folder(pipe, folder: Path, words: dict[str, str], seed: int, file: Path) -> dict[str, float]:
    """`measure`, and with words for both concepts `in_pairs`, with a folder's weights; kept in the file."""

    def draw():
        load_custom_diffusion(pipe, folder)
        row = measure(pipe, words, seed)
        if len(words) == len(LOOKS):
            row |= in_pairs(pipe, {name: f"{word} {name}" for name, word in words.items()}, seed)
        return row

    def predict():
        load_custom_diffusion(pipe, folder)
        return {f"{kind}, loss": loss for kind, loss in losses(pipe, words, seed).items()}

    row = runs.once(file.with_suffix(".losses.json"), predict) | runs.once(file, draw)
    unload_custom_diffusion(pipe)
    return row


def kept_folder(args: argparse.Namespace, seed: int) -> Path:
    return args.work_dir / "merging" / f"seed-{seed}-scores"


def measure_seed(args: argparse.Namespace, pipe, seed: int) -> dict[str, dict]:
    """What was measured by what the weights are, kept as it comes."""

    def kept(label, folder, words):
        return of_folder(pipe, folder, words, seed, kept_folder(args, seed) / f"{label}.json")

    apart = {name: trained(args, name, seed) for name in LOOKS}
    ones = [kept(name, folder, {name: "<new1>"}) for name, folder in apart.items()]
    rows = {"apart": ones[0] | ones[1], "in one run": kept("joint", trained(args, runs.JOINT, seed), runs.WORDS)}
    rows["apart"]["captions, loss"] = float(np.mean([one["captions, loss"] for one in ones]))
    for label, folder in merged_folders(args, apart, seed).items():
        rows[label] = kept(label, folder, runs.WORDS) | json.loads(folder.with_suffix(".json").read_text())
    return rows


def untrained_losses(args: argparse.Namespace, pipe, seed: int) -> dict[str, float]:
    """The new words of the untrained model are the one that they start from."""
    file = kept_folder(args, seed) / "base.losses.json"
    return runs.once(file, lambda: losses(pipe, dict.fromkeys(LOOKS, "ktn"), seed))


def described(args: argparse.Namespace, pipe, seed: int, bases: dict[str, Base]) -> dict[str, float]:
    """What the untrained model gets for the best descriptions in words."""
    prompts = {name: base.prompt for name, base in bases.items()}
    pairs = runs.once(kept_folder(args, seed) / "described.json", lambda: in_pairs(pipe, prompts, seed))
    return {name: base.score for name, base in bases.items()} | pairs


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    pipe = demo.load_pipeline(model=args.model)
    measured = {seed: measure_seed(args, pipe, seed) for seed in runs.seeds(args)}
    before = {seed: untrained_losses(args, pipe, seed) for seed in measured}
    bases = read_baselines(args.model)
    seeds = [
        {"best description": described(args, pipe, seed, bases)}
        | {label: row_of(kept, rows["apart"], before[seed], bases) for label, kept in rows.items()}
        for seed, rows in measured.items()
    ]
    results = {label: runs.summary([rows[label] for rows in seeds]) for label in seeds[0]}
    runs.write_json(args.docs / "merging.json", {"seeds": len(seeds)} | results)
    keys = results["merged"]
    lines = [["of 100", *keys]]
    for label, row in results.items():
        lines.append([label, *(runs.cell(row[key]["values"]) if key in row else "" for key in keys)])
    print("\n" + runs.table(lines))


if __name__ == "__main__":
    main()
