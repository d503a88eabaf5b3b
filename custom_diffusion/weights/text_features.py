"""Text features of concepts' prompts and of ordinary captions: what a merge goes by."""

import torch
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.errors import InputError

BATCH_SIZE = 16


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (n, t), and features (n, t, d) float64 on the CPU, padded as they are for drawing."""
    ids = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, text_encoder(ids.to(text_encoder.device))[0].cpu().double()


def position_weights(ids: torch.Tensor, end: int, own: torch.Tensor | None = None) -> torch.Tensor:
    """(n, t): 1 for every token up to the end token, and 1 in all for the padding after it, which is most of a prompt.

    Args:
        ids: (n, t), each row with an end token. end: its id.
        own: ids of a concept's tokens. Positions before the first of them weigh 0: they know nothing of the concept, and have
            the features that they have without it.
    """
    length = (ids == end).int().argmax(dim=1, keepdim=True) + 1
    padding = torch.arange(ids.shape[1]) >= length
    weights = torch.where(padding, 1 / padding.sum(dim=1, keepdim=True), 1.0)
    return weights if own is None else weights * (torch.isin(ids, own).cumsum(dim=1) > 0)


def moments(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: CLIPTextModel,
    prompts: list[str],
    tokens: list[str] | None = None,
) -> torch.Tensor:
    """Mean over the prompts of the weighted sum of c c' over their positions, (d, d) float64. Reads a batch at a time.

    Args:
        tokens: of a concept: only positions from the first of them on count.
    """
    own = None if tokens is None else torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    total = 0
    for start in range(0, len(prompts), BATCH_SIZE):
        ids, features = text_features(tokenizer, text_encoder, prompts[start : start + BATCH_SIZE])
        weights = position_weights(ids, tokenizer.eos_token_id, own).double()
        rows = (features * weights.sqrt().unsqueeze(-1)).flatten(0, 1)
        total = total + rows.T @ rows
    return total / len(prompts)


def concept_words(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, prompts: list[str], tokens: list[str]
) -> torch.Tensor:
    """Features of the words of these prompts from the first of the tokens to the end token, (s, d) float64."""
    ids, features = text_features(tokenizer, text_encoder, prompts)
    weights = position_weights(ids, tokenizer.eos_token_id, torch.tensor(tokenizer.convert_tokens_to_ids(tokens)))
    return features[weights == 1]
