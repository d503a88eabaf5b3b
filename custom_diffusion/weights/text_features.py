"""Text features of a concept's own words and of ordinary captions: what a merge goes by."""

import torch
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.errors import InputError
from custom_diffusion.progress import ProgressBar
from custom_diffusion.weights.constraints import drop_equal_rows
from custom_diffusion.weights.format import ConceptWeights


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
    for start in ProgressBar(range(0, len(captions), batch_size), desc="Reading captions", unit="batch"):
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
