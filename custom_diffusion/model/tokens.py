"""Modifier tokens: new words whose embeddings are trained while every other embedding stays as it is."""

import copy

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase


class TokenEmbedding(nn.Module):
    """Token embeddings of which only the modifier tokens' rows are trained.

    Args:
        base: the text encoder's own embedding, frozen.
        first_id: id of the first modifier token; the others follow it.
        modifier_rows: (num_modifiers, dim) start values.
    """

    def __init__(self, base: nn.Embedding, first_id: int, modifier_rows: torch.Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)  # first: the encoder's dtype is read from its first parameter
        self.modifiers = nn.Embedding.from_pretrained(modifier_rows.detach().clone().float(), freeze=False)
        self.first_id = first_id

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, T, dim) in the frozen embedding's dtype."""
        row = input_ids - self.first_id
        num_modifiers = self.modifiers.num_embeddings
        is_modifier = (row >= 0) & (row < num_modifiers)
        frozen = self.base(input_ids.masked_fill(is_modifier, 0))
        learned = self.modifiers(row.clamp(0, num_modifiers - 1)).to(frozen.dtype)
        return torch.where(is_modifier.unsqueeze(-1), learned, frozen)


def token_problems(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], prompts: list[list[str]]
) -> list[str]:
    """Why the tokenizer cannot work with these (modifier, initializer) pairs and prompts, one line each.

    Leaves the tokenizer as it is.

    Args:
        prompts: of each concept, every form in which training shows its prompt.
    """
    problems = []
    vocabulary = tokenizer.get_vocab()
    for modifier, initializer in pairs:
        if modifier in vocabulary or f"{modifier}</w>" in vocabulary:  # </w> ends a word
            problems.append(f"--modifier_token: the tokenizer already has {modifier!r}; choose another, like '<new1>'")
        ids = tokenizer(initializer, add_special_tokens=False).input_ids
        if len(ids) != 1:
            problems.append(
                f"--initializer_token: {initializer!r} is {len(ids)} tokens instead of one; choose a rarer short word, "
                "like 'ktn'"
            )
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([modifier for modifier, _ in pairs])
    for modifier, _ in pairs:
        if modifier not in vocabulary and (read := extended.tokenize(modifier)) != [modifier]:
            problems.append(
                f"--modifier_token: the tokenizer reads {modifier!r} as {' '.join(read)!r}; write for example '<new1>', "
                "in lower case"
            )
    if problems:
        return problems
    for forms in prompts:
        for prompt in forms:
            kept = extended.convert_ids_to_tokens(extended(prompt, truncation=True).input_ids)
            if lost := {modifier for modifier, _ in pairs if modifier in prompt}.difference(kept):
                problems.append(
                    f"--instance_prompt: in {prompt!r} {', '.join(sorted(lost))} is cut off at the model's "
                    f"{extended.model_max_length} tokens; shorten the prompt"
                )
                break
    return problems


def add_modifier_tokens(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, pairs: list[tuple[str, str]]
) -> None:
    """Freeze the text encoder and add the modifier tokens, each starting from its initializer's embedding.

    The text encoder's input embedding becomes a `TokenEmbedding`; with no pairs it stays as it is.
    """
    text_encoder.requires_grad_(False)
    if not pairs:
        return
    initializer_ids = [tokenizer(i, add_special_tokens=False).input_ids[0] for _, i in pairs]
    tokenizer.add_tokens([modifier for modifier, _ in pairs])
    first_id = tokenizer.convert_tokens_to_ids(pairs[0][0])
    base = text_encoder.get_input_embeddings()
    text_encoder.set_input_embeddings(TokenEmbedding(base, first_id, base.weight[initializer_ids]))


def remove_modifier_tokens(text_encoder: CLIPTextModel) -> None:
    """Put the text encoder's own embedding back."""
    embedding = text_encoder.get_input_embeddings()
    if isinstance(embedding, TokenEmbedding):
        text_encoder.set_input_embeddings(embedding.base)


def modifier_embeddings(text_encoder: CLIPTextModel) -> torch.Tensor | None:
    """(num_modifiers, dim) trained rows, or None without modifier tokens."""
    embedding = text_encoder.get_input_embeddings()
    return embedding.modifiers.weight if isinstance(embedding, TokenEmbedding) else None
