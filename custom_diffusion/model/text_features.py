"""Text features of concepts' prompts and of ordinary captions: what a merge goes by."""

import torch

from custom_diffusion.errors import InputError
from custom_diffusion.model.text_encoders import TextEncoders

BATCH_SIZE = 16


@torch.no_grad()
def add_tokens(text: TextEncoders, tokens: dict[str, torch.Tensor]) -> None:
    """Give the tokenizers and text encoders the modifier tokens. Raises InputError if their width does not fit."""
    for token, row in tokens.items():
        if row.shape != (sum(text.widths),):
            own = " + ".join(map(str, text.widths))
            raise InputError(f"--model: the embedding of {token} is {tuple(row.shape)}, the model's have {own} values")
    rows = torch.stack(list(tokens.values())).split(text.widths, dim=1)
    for tokenizer, encoder, own_rows in zip(text.tokenizers, text.encoders, rows):
        tokenizer.add_tokens(list(tokens))
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embedding = encoder.get_input_embeddings().weight
        embedding[tokenizer.convert_tokens_to_ids(list(tokens))] = own_rows.to(embedding)


@torch.no_grad()
def text_features(text: TextEncoders, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (n, t) of the first tokenizer, and features (n, t, d) float64 on the CPU, padded as they are for drawing."""
    ids = [
        tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer in text.tokenizers
    ]
    features, _ = text.encode_ids([own.to(text.device) for own in ids])
    return ids[0], features.cpu().double()


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


def moments(text: TextEncoders, prompts: list[str], tokens: list[str] | None = None) -> torch.Tensor:
    """Mean over the prompts of the weighted sum of c c' over their positions, (d, d) float64. Reads a batch at a time.

    Args:
        tokens: of a concept: only positions from the first of them on count.
    """
    tokenizer, total = text.tokenizers[0], 0
    own = None if tokens is None else torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    for start in range(0, len(prompts), BATCH_SIZE):
        ids, features = text_features(text, prompts[start : start + BATCH_SIZE])
        weights = position_weights(ids, tokenizer.eos_token_id, own).double()
        rows = (features * weights.sqrt().unsqueeze(-1)).flatten(0, 1)
        total = total + rows.T @ rows
    return total / len(prompts)


def concept_words(text: TextEncoders, prompts: list[str], tokens: list[str]) -> torch.Tensor:
    """Features of the words of these prompts from the first of the tokens to the end token, (s, d) float64."""
    tokenizer = text.tokenizers[0]
    ids, features = text_features(text, prompts)
    own = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    return features[position_weights(ids, tokenizer.eos_token_id, own) == 1]
