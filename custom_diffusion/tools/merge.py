"""Merge concepts that were trained apart, without training.

  custom-diffusion merge cat pot --captions real_reg/samples_cat real_reg/samples_pot --output cat-pot

Every concept's own words keep doing what they did, in many sentences, as far as ordinary captions and the other concepts
let them: the least squares of Custom Diffusion's equations 4 and 5. Tokens that clash are renamed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.class_folder import CAPTIONS
from custom_diffusion.cli.tool_flags import (
    add_model_flags,
    check_output_folder,
    model_problems,
    output_folder_problems,
    weights_problems,
)
from custom_diffusion.errors import InputError, warn
from custom_diffusion.files import whole_folder
from custom_diffusion.progress import ProgressBar

if TYPE_CHECKING:
    import torch

    from custom_diffusion.model.source import ModelSource
    from custom_diffusion.model.text_encoders import TextEncoders
    from custom_diffusion.weights.format import ConceptWeights
    from custom_diffusion.weights.least_squares import LayerReport

# Above this share of the trained change, little of a concept is left.
MAX_LOST = 0.8
CONTEXTS = 50  # sentences about a concept to fit to, each with two beginnings: more change little
HELD_OUT = 5  # one in so many is kept back, to tell how well the others were enough
OPENINGS = ("", "a ", "a photo of ")  # that prompts have besides the one of training
SENTENCES = (
    "a {}", "{}", "photo of a {}", "a photo of the {}", "a picture of one {} on a table", "two {}s in a garden",
    "a painting of a {} by the sea", "the {} in front of a house", "a small {} on the street at night",
    "an old {} with flowers", "a {} made of paper", "close up of a white {}", "a black and red {} in the snow",
    "a child looks at the {}", "a drawing of a {}, in the style of a comic", "my {} under a tree, in the morning light",
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", nargs="+", help="two or more trained folders or Hub ids")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="PATH",
        help="ordinary captions, which should not change: text files with one a line, or class folders of retrieve.py "
        "(default: sentences made of the concepts' classes)",
    )
    parser.add_argument("--max_captions", type=int, default=200, help="captions to use (default: %(default)s)")
    add_model_flags(parser)


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = [problem for path in args.weights for problem in weights_problems("weights", path)]
    if len(args.weights) < 2:
        problems.append("weights: one folder has nothing to merge with; give two or more")
    for path in args.captions:
        if not caption_file(path).is_file():
            problems.append(f"--captions: no file '{caption_file(path)}'; give a text file or a class folder")
    if args.max_captions < 1:
        problems.append(f"--max_captions: {args.max_captions} must be 1 or more")
    return problems + model_problems(args) + output_folder_problems(args.output)


def caption_file(path: str | Path) -> Path:
    """A class folder of `retrieve.py` keeps its captions in a file of its own."""
    return Path(path) / CAPTIONS if Path(path).is_dir() else Path(path)


def main(args: argparse.Namespace) -> None:
    """Merge; print what was renamed, and how well each layer was merged."""
    flags = {name: value for name, value in vars(args).items() if name != "tool"}
    merge(flags.pop("weights"), **flags)


def merge(
    weights: list[ConceptWeights | str | Path],
    *,
    output: str | Path,
    captions: list[str | Path] = (),
    max_captions: int = 200,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
) -> dict[str, LayerReport]:
    """Write one folder with several concepts.

    Args:
        weights: trained folders, Hub ids, or weights already read; two or more.
        output: folder to write.
        captions: ordinary captions, which should not change: text files with one a line, or class folders; by default
            sentences made of the concepts' classes. max_captions: how many to use.
        model, revision, variant: the base model, by default the one that the weights name.
        config_from: folder or Hub id that has the configuration and tokenizers of a base model in one file.
    Returns:
        How well each matrix was merged, by name.
    Raises:
        InputError: the weights or the model cannot be used, or the output folder holds something, or not merged.
    """
    import torch

    from custom_diffusion.model.loading import base_tensors, empty_unet_for, load_text
    from custom_diffusion.model.source import base_of
    from custom_diffusion.model.text_features import add_tokens
    from custom_diffusion.weights.format import ConceptWeights, as_weights, write_weights
    from custom_diffusion.weights.low_rank import full_tensors

    check_output_folder(output)
    parts = [as_weights(part) for part in weights]
    names = [
        f"concept {number}" if isinstance(part, ConceptWeights) else Path(part).name
        for number, part in enumerate(weights, start=1)
    ]
    source = base_of(common_config(names, parts, model), model, revision, variant, config_from)
    for name, part in zip(names, parts):
        check_mergeable(name, part)
        unet = empty_unet_for(part, source)
        if part.shapes().keys() != parts[0].shapes().keys():
            raise InputError(f"weights: '{name}' and '{names[0]}' are for different layers of the model")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    text = load_text(source, device)
    parts, renamed = rename_clashing(parts, set().union(*(tokenizer.get_vocab() for tokenizer in text.tokenizers)))
    for name, changed in zip(names, renamed):
        for old, new in changed.items():
            print(f"{name}: {old} is now {new}")
    tokens = {token: row for part in parts for token, row in part.tokens.items()}
    add_tokens(text, tokens)
    ordinary = regularisation_captions(parts, captions, max_captions)
    base = base_tensors(source, parts[0].shapes())
    matrices = [full_tensors(part, base) for part in parts]
    refuse_contradictions(text, names, parts, matrices)
    tensors, reports = solve(text, parts, ordinary, matrices, base)
    config = merged_config(names, source, parts, renamed)
    merged = ConceptWeights(tensors, tokens, config, token_widths=parts[0].token_widths)
    with whole_folder(Path(output)) as folder:
        write_weights(folder, merged, unet, ("safetensors", "bin"))
    print_reports(names, reports)
    print(f"{output}: {', '.join(merged.tokens)}")
    return reports


def refuse_contradictions(
    text: TextEncoders, names: list[str], parts: list[ConceptWeights], matrices: list[dict]
) -> None:
    """Raises InputError if two concepts want different things of words that both have."""
    from custom_diffusion.model.text_features import concept_words
    from custom_diffusion.weights.least_squares import Contradiction, check_contradictions

    words = [concept_words(text, [phrase for _, phrase, _ in phrases(part)], list(part.tokens)) for part in parts]
    try:
        check_contradictions(words, matrices)
    except Contradiction as error:
        raise InputError(
            f"weights: '{names[error.first]}' and '{names[error.second]}' want different things of the same words; are "
            "they of one concept? Merge one of them"
        ) from None


def solve(
    text: TextEncoders,
    parts: list[ConceptWeights],
    captions: list[str],
    matrices: list[dict],
    base: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, LayerReport]]:
    """The merged matrices and how well each does, by name."""
    from custom_diffusion.model.text_features import moments
    from custom_diffusion.weights.least_squares import LeastSquares, merge_layers

    groups = [(captions, None), ([""], None)]
    for part in parts:
        prompts, tokens = concept_prompts(part, captions), list(part.tokens)
        groups.append((prompts[HELD_OUT - 1 :: HELD_OUT], tokens))
        del prompts[HELD_OUT - 1 :: HELD_OUT]
        groups.append((prompts, tokens))
    reading = ProgressBar(groups, desc="Reading prompts", unit="group")
    ordinary, unguided, *concepts = (moments(text, prompts, tokens) for prompts, tokens in reading)
    held_out, fitted = concepts[::2], concepts[1::2]
    # Every image is drawn with the empty prompt too, for guidance: it weighs as much as all the captions.
    return merge_layers(LeastSquares(fitted, ordinary + unguided), matrices, base, held_out, ordinary)


def common_config(names: list[str], parts: list[ConceptWeights], model: str | None) -> dict:
    """The settings that name the base model. Raises InputError if the parts have different ones and no model is given."""
    bases = [_base(part.config) for part in parts]
    if model is None and len(set(bases)) > 1:
        models = ", ".join(f"'{name}' on {base}" for name, (base, _) in zip(names, bases))
        raise InputError(
            f"weights: trained on different models ({models}); if they are one model, name it with --model"
        )
    return parts[0].config


def _base(config):
    """What must be the same of all parts. A single file may have moved, or have another name."""
    file = config.get("base_file")
    if file:
        return f"a file of {file['size']:,} bytes, header {file['header_sha256'][:12]}", None
    return config.get("base_model"), config.get("revision")


def check_mergeable(path: str, part: ConceptWeights) -> None:
    """Raises InputError if these weights cannot be merged by their text features."""
    if not part.tokens:
        raise InputError(
            f"weights: '{path}' has no modifier token, by which its concept could be told; it cannot be merged"
        )
    other = [name for name in part.shapes() if not re.search(r"\.to_[kv]\.weight$", name)]
    if other:
        raise InputError(
            f"weights: '{path}' has trained {other[0]} too (--freeze_model crossattn); only keys and values, which see "
            "nothing but the text, can be merged"
        )


def rename_clashing(
    parts: list[ConceptWeights], vocabulary: set[str]
) -> tuple[list[ConceptWeights], list[dict[str, str]]]:
    """Give tokens that an earlier part has too a new name, in the prompts of their settings as well.

    Returns:
        The parts, and for each what was renamed.
    """
    taken, result, renamed = set(vocabulary), [], []
    every = {token for part in parts for token in part.tokens}
    for part in parts:
        names = {}
        for token in part.tokens:
            names[token] = token if token not in taken else _free_name(token, taken | every)
            taken.add(names[token])
        longest_first = sorted(names, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        concepts = [
            concept
            | {
                "instance_prompt": pattern.sub(
                    lambda match, names=names: names[match.group()], concept["instance_prompt"]
                )
            }
            for concept in part.config.get("concepts", [])
        ]
        tokens = {names[token]: row for token, row in part.tokens.items()}
        config = part.config | {"concepts": concepts, "modifier_tokens": list(tokens)}
        result.append(replace(part, tokens=tokens, config=config))
        renamed.append({old: new for old, new in names.items() if old != new})
    return result, renamed


def _free_name(token, taken):
    """<new1> becomes <new2>, or the first free number after."""
    stem, end = (token[:-1], ">") if token.endswith(">") else (token, "")
    stem, number = stem.rstrip("0123456789"), 2
    while f"{stem}{number}{end}" in taken:
        number += 1
    return f"{stem}{number}{end}"


def regularisation_captions(parts: list[ConceptWeights], captions: list[str | Path], max_captions: int) -> list[str]:
    """The captions of these files, taken in turn from each, or sentences made of the parts' classes."""
    files = []
    for path in captions:
        # As in a class folder, only "\n" ends a line: str.splitlines would also cut inside a caption.
        lines = caption_file(path).read_text(encoding="utf-8", errors="replace").split("\n")
        files.append([line.strip() for line in lines if line.strip()])
        if not files[-1]:
            raise InputError(f"--captions: '{caption_file(path)}' is empty; give one caption a line")
    if not files:
        classes = {c.get("class_prompt") for part in parts for c in part.config["concepts"]} - {None}
        if not classes:
            raise InputError("--captions: the weights name no class to make sentences of; give captions")
        files = [[sentence.format(name) for sentence in SENTENCES] for name in sorted(classes)]
    longest = max(map(len, files))
    in_turn = [lines[i] for i in range(longest) for lines in files if i < len(lines)]
    return list(dict.fromkeys(in_turn))[:max_captions]


def phrases(part: ConceptWeights) -> list[tuple[str, str, str | None]]:
    """Of each concept what its prompt says before it, how it is called, and its class: "photo of a ", "<new1> cat", "cat"."""
    found = []
    for concept in part.config["concepts"]:
        prompt, name = concept["instance_prompt"], concept.get("class_prompt")
        spans = [(prompt.index(token), prompt.index(token) + len(token)) for token in part.tokens if token in prompt]
        if not spans:
            continue
        if name and (match := re.search(rf"\b{re.escape(name)}\b", prompt)):
            spans.append(match.span())
        start, end = min(spans)[0], max(end for _, end in spans)
        found.append((prompt[:start], prompt[start:end], name))
    unmentioned = [token for token in part.tokens if not any(token in phrase for _, phrase, _ in found)]
    return found + [("", token, None) for token in unmentioned]


def contexts(class_name: str | None, captions: list[str]) -> list[tuple[str, str]]:
    """What stands before and after the class's name in captions; where too few have it, in sentences made for it."""
    found = []
    if class_name:
        pattern = re.compile(rf"\b{re.escape(class_name)}\b", re.IGNORECASE)
        matches = [(caption, pattern.search(caption)) for caption in captions]
        found = [(caption[: m.start()], caption[m.end() :]) for caption, m in matches if m][:CONTEXTS]
    return found if len(found) >= len(SENTENCES) else found + [tuple(s.split("{}")) for s in SENTENCES]


def concept_prompts(part: ConceptWeights, captions: list[str]) -> list[str]:
    """Sentences about the concepts of these weights, each once: the prompts of training, and captions that name the class."""
    from custom_diffusion.training.augmentation import PROMPT_PREFIXES

    prompts = [prefix + concept["instance_prompt"] for concept in part.config["concepts"] for prefix in PROMPT_PREFIXES]
    for before, phrase, class_name in phrases(part):
        beginnings = [*OPENINGS, *(prefix + before for prefix in PROMPT_PREFIXES)]
        prompts += [beginning + phrase for beginning in beginnings]
        for i, (start, end) in enumerate(contexts(class_name, captions)):
            prompts += [start + phrase + end, beginnings[i % len(beginnings)] + phrase + end]
    return list(dict.fromkeys(prompts))


def print_reports(names: list[str], reports: dict[str, LayerReport]) -> None:
    """A table, what is left of each concept, and warnings where that is little."""
    width = max(len(name) for name in reports)
    print(f"{'layer':<{width}}  {'  '.join(f'lost of {name}' for name in names)}  change on captions  in training")
    for layer, report in reports.items():
        lost = "  ".join(f"{share:>{len(name) + 8}.3f}" for name, share in zip(names, report.lost))
        print(f"{layer:<{width}}  {lost}  {report.change:18.4f}  {report.trained_change:11.4f}")
    for name, shares in zip(names, zip(*(report.lost for report in reports.values()))):
        mean = sum(shares) / len(shares)
        print(f"{name}: {mean:.2f} of the trained change is lost, in sentences that were not fitted to")
        if mean > MAX_LOST:
            warn(f"the merge keeps little of '{name}': the concepts want too different things of too similar words")
    changed = [name for name, report in reports.items() if report.change > report.trained_change]
    if changed:
        warn(f"{len(changed)} of {len(reports)} matrices change ordinary captions by more than training did")


def merged_config(
    names: list[str], source: ModelSource, parts: list[ConceptWeights], renamed: list[dict[str, str]]
) -> dict:
    """The settings file of the merged folder."""
    return {
        **source.recorded(),
        **{name: parts[0].config[name] for name in ("family", "inpainting") if name in parts[0].config},
        "freeze_model": "crossattn_kv",
        "modifier_tokens": [token for part in parts for token in part.tokens],
        "concepts": [concept for part in parts for concept in part.config["concepts"]],
        "merged_from": [
            {
                "weights": name,
                "tokens": list(part.tokens),
                "renamed": new_names,
                "steps": part.config.get("steps"),
            }
            for name, part, new_names in zip(names, parts, renamed)
        ],
        # As what the concepts were trained with, which drawing takes too
        "settings": {"pretrained_vae_model_name_or_path": source.vae, "prediction_type": source.prediction_type},
        "versions": parts[0].config.get("versions", {}),
    }
