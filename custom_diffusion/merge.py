"""Merge concepts that were trained apart, without training."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
import re
from pathlib import Path

from custom_diffusion.args import InputError
from custom_diffusion.command import (
    add_model_flags,
    make_parser,
    model_problems,
    output_folder_problems,
    parse,
    run,
    warn,
    weights_problems,
)

EXAMPLE = """

  python -m custom_diffusion.merge logs/cat logs/pot --captions real_reg/samples_cat real_reg/samples_pot --output logs/cat-pot

Every concept keeps what its own words do, exactly, and ordinary captions change as little as possible (Custom Diffusion,
equations 4 and 5). Tokens that clash are renamed.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("merge", __doc__ + EXAMPLE)
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
    return parse(parser, argv, _problems)


def _problems(args):
    problems = [problem for path in args.weights for problem in weights_problems("weights", path)]
    if len(args.weights) < 2:
        problems.append("weights: one folder has nothing to merge with; give two or more")
    for path in args.captions:
        if not caption_file(path).is_file():
            problems.append(f"--captions: no file '{caption_file(path)}'; give a text file or a class folder")
    if args.max_captions < 1:
        problems.append(f"--max_captions: {args.max_captions} must be 1 or more")
    return problems + model_problems(args) + output_folder_problems(args.output)


def caption_file(path: str) -> Path:
    """A class folder of `retrieve.py` keeps its captions in caption.txt."""
    return Path(path) / "caption.txt" if Path(path).is_dir() else Path(path)


if __name__ == "__main__":
    args = parse_args()

import torch
from tqdm.auto import tqdm
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.base_model import (
    base_of,
    base_tensors,
    check_shapes,
    empty_unet,
    load_text_encoder,
    load_tokenizer,
    read_concept,
)
from custom_diffusion.constraints import Constraints, LayerReport, drop_equal_rows
from custom_diffusion.files import whole_folder
from custom_diffusion.low_rank import full_tensors
from custom_diffusion.weights import ConceptWeights, write_weights

# Above these, a merge is suspect: features that nearly depend on one another force large changes elsewhere.
MAX_CONDITIONING = 1e10
MAX_CHANGE = 0.5
SENTENCES = (
    "a {}", "{}", "photo of a {}", "a photo of the {}", "a picture of one {} on a table", "two {}s in a garden",
    "a painting of a {} by the sea", "the {} in front of a house", "a small {} on the street at night",
    "an old {} with flowers", "a {} made of paper", "close up of a white {}", "a black and red {} in the snow",
    "a child looks at the {}", "a drawing of a {}, in the style of a comic", "my {} under a tree, in the morning light",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    parts = [read_concept("weights", path) for path in args.weights]
    source = base_of(args, common_config(args, parts))
    unet = empty_unet(source)
    for path, part in zip(args.weights, parts):
        check_mergeable(path, part)
        check_shapes(part, unet, source)
        if part.shapes().keys() != parts[0].shapes().keys():
            raise InputError(f"weights: '{path}' and '{args.weights[0]}' are for different layers of the model")
    tokenizer, text_encoder = load_tokenizer(source), load_text_encoder(source)
    parts, renamed = rename_clashing(parts, set(tokenizer.get_vocab()))
    for path, names in zip(args.weights, renamed):
        for old, new in names.items():
            print(f"{path}: {old} is now {new}")
    add_tokens(tokenizer, text_encoder, {token: row for part in parts for token, row in part.tokens.items()})
    captions = regularisation_captions(args, parts)
    regularisation = caption_moments(tokenizer, text_encoder, captions)
    words = [concept_words(tokenizer, text_encoder, part) for part in parts]
    try:
        constraints = Constraints(regularisation, torch.cat(words))
    except ValueError as error:
        raise InputError(f"weights: {error}; merge fewer concepts, or ones with shorter prompts") from None
    if constraints.rank < len(regularisation):
        warn(f"the captions span {constraints.rank} of {len(regularisation)} text features; more --captions do better")
    base = base_tensors(source, parts[0].shapes())
    tensors, reports = merge_layers(constraints, words, [full_tensors(part, base) for part in parts], base)
    merged = ConceptWeights(tensors, {t: row for part in parts for t, row in part.tokens.items()})
    merged.config = merged_config(args, source, parts, renamed)
    with whole_folder(Path(args.output)) as folder:
        write_weights(folder, merged, unet, ("safetensors", "bin"))
    print_reports(reports)
    print(f"{args.output}: {', '.join(merged.tokens)}")


def common_config(args: argparse.Namespace, parts: list[ConceptWeights]) -> dict:
    """The settings that name the base model. Raises InputError if the parts have different ones."""
    names = [(p.config.get("base_model"), p.config.get("revision")) for p in parts]
    if args.model is None and len(set(names)) > 1:
        models = ", ".join(f"'{path}' on {name}" for path, (name, _) in zip(args.weights, names))
        raise InputError(
            f"weights: trained on different models ({models}); if they are one model, name it with --model"
        )
    return parts[0].config


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
        result.append(ConceptWeights(part.tensors, tokens, config, part.deltas))
        renamed.append({old: new for old, new in names.items() if old != new})
    return result, renamed


def _free_name(token, taken):
    """<new1> becomes <new2>, or the first free number after."""
    stem, end = (token[:-1], ">") if token.endswith(">") else (token, "")
    stem, number = stem.rstrip("0123456789"), 2
    while f"{stem}{number}{end}" in taken:
        number += 1
    return f"{stem}{number}{end}"


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, tokens: dict[str, torch.Tensor]
) -> None:
    """Give the tokenizer and the text encoder the modifier tokens. Raises InputError if their width does not fit."""
    width = text_encoder.get_input_embeddings().weight.shape[1]
    for token, row in tokens.items():
        if row.shape != (width,):
            raise InputError(
                f"--model: the embedding of {token} is {tuple(row.shape)}, the model's have {width} values"
            )
    tokenizer.add_tokens(list(tokens))
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, row in tokens.items():
            embedding[tokenizer.convert_tokens_to_ids(token)] = row


def regularisation_captions(args: argparse.Namespace, parts: list[ConceptWeights]) -> list[str]:
    """The captions of `--captions`, taken in turn from each file, or sentences made of the parts' classes."""
    files = []
    for path in args.captions:
        lines = caption_file(path).read_text(encoding="utf-8", errors="replace").splitlines()
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
    return list(dict.fromkeys(in_turn))[: args.max_captions]


@torch.no_grad()
def text_features(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, prompts: list[str]
) -> list[tuple[list[int], torch.Tensor]]:
    """Per prompt the token ids and their (t, d) float64 features, from the start token up to the end token.

    No padding to full length: a token's features depend on what is before it only.
    """
    ids = [tokenizer(prompt, truncation=True).input_ids for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids])
    features = text_encoder(padded)[0].double()
    return [(row, feature[: len(row)]) for row, feature in zip(ids, features)]


def caption_moments(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, captions: list[str], batch_size: int = 16
) -> torch.Tensor:
    """C_reg' C_reg, (d, d): of every token of the captions but the start token."""
    # Batches of about the same length need little padding.
    captions = sorted(captions, key=lambda caption: len(tokenizer(caption, truncation=True).input_ids))
    moments = 0
    for start in tqdm(range(0, len(captions), batch_size), desc="Reading captions", unit="batch"):
        batch = text_features(tokenizer, text_encoder, captions[start : start + batch_size])
        rows = torch.cat([features[1:] for _, features in batch])
        moments = moments + rows.T @ rows
    return moments


def concept_words(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, part: ConceptWeights
) -> torch.Tensor:
    """C, (s, d): features of a concept's own words, which are its modifier token and all that comes after it.

    From its prompt ("photo of a <new1> cat") and from the prompt's end ("<new1> cat"). Words before the token have the
    features that they have without it, and must stay as they are. Rows that are equal come once.
    """
    prompts = [concept["instance_prompt"] for concept in part.config["concepts"]]
    prompts += [token for token in part.tokens if not any(token in prompt for prompt in prompts)]
    own_ids = set(tokenizer.convert_tokens_to_ids(list(part.tokens)))
    rows = []
    for prompt in prompts:
        starts = [prompt.index(token) for token in part.tokens if token in prompt]
        if not starts:
            continue
        for ids, features in text_features(tokenizer, text_encoder, [prompt, prompt[min(starts) :]]):
            first = next((i for i, token_id in enumerate(ids) if token_id in own_ids), len(ids))
            rows += list(features[first:])
    return drop_equal_rows(torch.stack(rows))


def merge_layers(
    constraints: Constraints,
    words: list[torch.Tensor],
    parts: list[dict[str, torch.Tensor]],
    base: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, LayerReport]]:
    """Merge every matrix.

    Args:
        words: C of each part, (s_i, d). parts: each part's matrices by name. base: the base model's.
    Returns:
        The merged matrices, float32, and the reports, by name.
    """
    tensors, reports = {}, {}
    for name in tqdm(base, desc="Merging", unit="matrix"):
        targets = torch.cat([rows @ part[name].double().T for rows, part in zip(words, parts)])  # V: (s, out)
        merged, reports[name] = constraints.merge(base[name], targets)
        tensors[name] = merged.float()
    return tensors, reports


def print_reports(reports: dict[str, LayerReport]) -> None:
    """A table, and warnings where a merge is suspect."""
    print(f"{'layer':<72} residual  change on captions  conditioning")
    for name, report in reports.items():
        short = name.removesuffix(".weight")
        print(f"{short:<72} {report.residual:8.1e}  {report.change:18.4f}  {report.conditioning:12.1e}")
    worst = max(reports.values(), key=lambda report: report.conditioning)
    if worst.conditioning > MAX_CONDITIONING:
        warn(
            f"the merge is ill-conditioned ({worst.conditioning:.1e}): words of the concepts have nearly the same features"
        )
    changed = [name for name, report in reports.items() if report.change > MAX_CHANGE]
    if changed:
        warn(
            f"{len(changed)} of {len(reports)} matrices change ordinary captions by more than {100 * MAX_CHANGE:.0f} %"
        )


def merged_config(args: argparse.Namespace, source, parts: list[ConceptWeights], renamed: list[dict[str, str]]) -> dict:
    """The settings file of the merged folder."""
    return {
        "base_model": source.path,
        "revision": source.revision,
        "variant": source.variant,
        "freeze_model": "crossattn_kv",
        "modifier_tokens": [token for part in parts for token in part.tokens],
        "concepts": [concept for part in parts for concept in part.config["concepts"]],
        "merged_from": [
            {
                "weights": Path(path).name,
                "tokens": list(part.tokens),
                "renamed": names,
                "steps": part.config.get("steps"),
            }
            for path, part, names in zip(args.weights, parts, renamed)
        ],
        "versions": parts[0].config.get("versions", {}),
    }


if __name__ == "__main__":
    run("merge", main, args)
