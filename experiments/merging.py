# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What merging keeps of concepts, and of all else, measured on the small model: `python experiments/merging.py`.

For every seed: two concepts (a teal circle with an orange edge, a magenta square with a lime edge) trained apart, and in one run;
those trained apart merged by `custom_diffusion merge`, by the paper's equations as its authors apply them, and by a plain average.
Prints the table of means with their standard errors, and writes docs/merging.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from baselines import read as read_baselines
from concept import LOOKS, Base, pair_scores, places, scores
from judge import generate, likeness, see

import demo
from custom_diffusion import load_custom_diffusion, merge, unload_custom_diffusion
from custom_diffusion.model.loading import base_tensors, empty_unet, load_text
from custom_diffusion.model.source import ModelSource
from custom_diffusion.model.text_features import add_tokens, text_features
from custom_diffusion.weights.format import ConceptWeights, read_weights, write_weights
from custom_diffusion.weights.low_rank import full_tensors

WORDS = {"circle": "<new1>", "square": "<new2>"}  # as merged
OTHER_SENTENCES = ("a photo of {}", "{}", "a {}")  # than those of training


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def trained_together(args: argparse.Namespace, seed: int) -> Path:
    """The folder of weights of one run with both concepts, trained now if it is not there."""
    folder = (args.work_dir / "together" / f"seed-{seed}").resolve()
    if (folder / "run.json").is_file():
        return folder / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    concepts = [
        {
            "instance_prompt": f"photo of a {WORDS[name]} {name}",
            "class_prompt": name,
            "instance_data_dir": str(runs.photos(args.work_dir, name).resolve()),
            "class_data_dir": str(runs.class_images(args.work_dir, name).resolve()),
        }
        for name in LOOKS
    ]
    runs.write_json(folder / "concepts.json", concepts)
    command = demo.training_flags(
        folder / "weights", "both", Path("both"), Path("both"), args.steps, seed=seed, model=args.model
    )
    for flag in ("--instance_data_dir", "--instance_prompt", "--class_data_dir", "--class_prompt", "--modifier_token"):
        del command[command.index(flag) : command.index(flag) + 2]
    command += ["--concepts_list", str(folder / "concepts.json"), "--modifier_token", "+".join(WORDS.values())]
    command += ["--checkpointing_steps", str(args.steps + 1), *runs.FLAGS]
    runs.run("train_custom_diffusion.py", *command, threads=args.threads, log=folder / "training.log")
    runs.write_json(folder / "run.json", {"seed": seed, "steps": args.steps})
    return folder / "weights"


def write_other(
    args: argparse.Namespace, tensors: dict[str, torch.Tensor], merged: ConceptWeights, output: Path
) -> Path:
    """A folder with these matrices and the tokens of the merged one."""
    unet = empty_unet(ModelSource(str(args.model)))
    write_weights(output, ConceptWeights(tensors, merged.tokens, merged.config), unet, ("bin",))
    return output


def authors_solution(
    args: argparse.Namespace, parts: list[dict], merged: ConceptWeights, captions: list[str]
) -> dict[str, torch.Tensor]:
    """Equations 4 and 5 as the authors' script applies them.

    Exact in "<new1> circle" and "a photo of <new1> circle", from the first word to the end token; the regularisation is 200
    captions without padding and without a ridge, each from the first word, or from the one behind "photo of a".
    """
    source = ModelSource(str(args.model))
    text = load_text(source, torch.device("cpu"))
    add_tokens(text, merged.tokens)

    def rows(prompts):
        ids, features = text_features(text, prompts)
        ends = (ids == text.tokenizers[0].eos_token_id).int().argmax(1) + 1
        starts = [4 if "photo of a" in prompt[:15] else 1 for prompt in prompts]
        return torch.cat([one[start:end] for one, start, end in zip(features, starts, ends)])

    ordinary = rows(captions[:200])
    constraints, owner = [], []
    for number, name in enumerate(LOOKS):
        for row in rows([f"{WORDS[name]} {name}", f"a photo of {WORDS[name]} {name}"]):
            if all((row - other).abs().mean() > 0 for other in constraints):
                constraints.append(row)
                owner.append(number)
    c = torch.stack(constraints)
    d = torch.linalg.solve(ordinary.T @ ordinary, c.T).T
    solution = {}
    for name, matrix in base_tensors(source, list(parts[0])).items():
        targets = torch.stack([row @ parts[number][name].double().T for row, number in zip(c, owner)])
        errors = targets.T - matrix.double() @ c.T
        solution[name] = (matrix.double() + errors @ torch.linalg.solve(d @ c.T, d)).float()
    return solution


def merged_folders(args: argparse.Namespace, folders: dict[str, Path], seed: int) -> dict[str, Path]:
    """By the way in which they were merged, from concepts trained apart."""
    output = args.work_dir / "merged" / f"seed-{seed}"
    if (output / "done.json").is_file():
        return {label: output / label for label in json.loads((output / "done.json").read_text())}
    captions = [runs.class_images(args.work_dir, name) for name in LOOKS]
    merge(list(folders.values()), captions=captions, model=str(args.model), output=output / "merged")
    merged, source = read_weights(output / "merged"), ModelSource(str(args.model))
    parts = [read_weights(folder) for folder in folders.values()]
    base = base_tensors(source, parts[0].shapes())
    whole = [full_tensors(part, base) for part in parts]
    lines = [line for folder in captions for line in (folder / "caption.txt").read_text().splitlines()]
    write_other(args, authors_solution(args, whole, merged, lines), merged, output / "authors")
    average = {name: torch.stack([tensors[name] for tensors in whole]).mean(0) for name in base}
    write_other(args, average, merged, output / "average")
    labels = ["merged", "authors", "average"]
    runs.write_json(output / "done.json", labels)
    return {label: output / label for label in labels}


def other_sentences_score(pipe, word: str, name: str, seed: int) -> float:
    """0 to 100: the mean likeness to the concept in sentences that training never showed, on every background."""
    prompts = [f"{sentence.format(f'{word} {name}')} {place}" for sentence in OTHER_SENTENCES for place in places(1)]
    return 100 * float(np.mean([likeness(see(image), LOOKS[name]) for image in generate(pipe, prompts, seed)]))


def measure(pipe, words: dict[str, str], seed: int, bases: dict[str, Base]) -> dict[str, float]:
    """Of what the pipeline has loaded, by its words for the concepts: each one's scores, and the means of what concerns both."""
    of_concepts = {name: scores(pipe, word, seed, bases[name]) for name, word in words.items()}
    row = {name: one["concept"] for name, one in of_concepts.items()}
    row |= {f"{name}, other sentences": other_sentences_score(pipe, word, name, seed) for name, word in words.items()}
    return row | {
        key: float(np.mean([one[key] for one in of_concepts.values()])) for key in ("prior", "prior_class", "leakage")
    }


def measure_seed(args: argparse.Namespace, pipe, seed: int, bases: dict[str, Base]) -> dict[str, dict]:
    """Scores by what the weights are, kept as they come."""
    kept = args.work_dir / "merged" / f"seed-{seed}-scores"
    apart = {
        name: runs.trained(args.work_dir, name, seed, args.steps, threads=args.threads, model=args.model)
        for name in LOOKS
    }
    rows = {
        "base model": runs.once(
            kept / "base.json", lambda: of_weights(pipe, None, dict.fromkeys(WORDS, "ktn"), seed, bases)
        )
    }
    ones = [
        runs.once(kept / f"{name}.json", lambda name=name: of_weights(pipe, apart[name], {name: "<new1>"}, seed, bases))
        for name in LOOKS
    ]
    rows["apart"] = {key: float(np.mean([one[key] for one in ones if key in one])) for key in ones[0] | ones[1]}
    folders = {"in one run": trained_together(args, seed)} | merged_folders(args, apart, seed)
    for label, folder in folders.items():
        rows[label] = runs.once(
            kept / f"{label}.json", lambda folder=folder: of_weights(pipe, folder, WORDS, seed, bases)
        )
    return rows


def of_weights(pipe, folder: Path | None, words: dict[str, str], seed: int, bases: dict[str, Base]) -> dict[str, float]:
    """`measure` and, of two concepts, `pair_scores`, with the weights of a folder or none."""
    if folder is not None:
        load_custom_diffusion(pipe, folder)
    row = measure(pipe, words, seed, bases)
    if len(words) == 2:
        pairs = pair_scores(pipe, words, seed)
        row |= {f"pairs: {key}": pairs[key] for key in ("pair", "kept", "swapped", "lost")}
    if folder is not None:
        unload_custom_diffusion(pipe)
    return row


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    bases, pipe = read_baselines(args.model), demo.load_pipeline(model=args.model)
    seeds = [measure_seed(args, pipe, seed, bases) for seed in runs.seeds(args)]
    results = {label: runs.summary([rows[label] for rows in seeds]) for label in seeds[0]}
    runs.write_json(args.docs / "merging.json", {"seeds": len(seeds)} | results)
    keys = results["merged"]
    lines = [["of 100", *keys]]
    for label, row in results.items():
        lines.append([label, *(runs.cell(row[key]["values"]) if key in row else "" for key in keys)])
    print("\n" + runs.table(lines))


if __name__ == "__main__":
    main()
