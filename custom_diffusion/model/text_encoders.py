"""A family's text encoders as one module: prompts in, text features out."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from custom_diffusion.families import Family
from custom_diffusion.model.tokens import add_modifier_tokens, modifier_embeddings, remove_modifier_tokens
from custom_diffusion.weights.end_token import pool_at


class TextEncoders(nn.Module):
    """Tokenizers and text encoders of a family.

    Prompts without a modifier token have constant features: they are encoded once, one at a time, and kept.

    Args:
        tokenizers, encoders: one of each for each of `family.texts`, in that order.
    """

    def __init__(
        self, family: Family, tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[PreTrainedModel]
    ):
        super().__init__()
        self.family = family
        self.tokenizers = list(tokenizers)
        self.encoders = nn.ModuleList(encoders)
        self.modifier_tokens = []
        self._end_ids = []  # by which the encoders found a prompt's end before there were new words
        self.constant_features = {}
        self._ids = {}

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the features."""
        return self.encoders[0].dtype

    @property
    def widths(self) -> tuple[int, ...]:
        """How many values of a word's embedding belong to each encoder."""
        return tuple(encoder.config.hidden_size for encoder in self.encoders)

    def add_words(self, pairs: list[tuple[str, str]]) -> None:
        """Freeze the encoders, and give each tokenizer and encoder the modifier tokens of (modifier, initializer) `pairs`."""
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            add_modifier_tokens(tokenizer, encoder, pairs)
            if pairs and self.family.pools:
                self._end_ids.append(pool_at(encoder, tokenizer.eos_token_id))
        self.modifier_tokens = [modifier for modifier, _ in pairs]
        self.constant_features.clear()
        self._ids.clear()

    def remove_words(self) -> None:
        """Put the encoders' own embeddings back. The tokenizers keep the words."""
        for encoder in self.encoders:
            remove_modifier_tokens(encoder)
        for encoder, end_id in zip(self.encoders, self._end_ids):
            pool_at(encoder, end_id)
        self._end_ids = []
        self.modifier_tokens = []

    def trained_rows(self) -> list[nn.Parameter]:
        """(num_modifiers, width) embeddings of the modifier tokens in each encoder; empty without any."""
        return [modifier_embeddings(encoder) for encoder in self.encoders if self.modifier_tokens]

    def parts(self) -> dict[str, object]:
        """Encoders and tokenizers by what the family's pipelines call them."""
        parts = {}
        for text, tokenizer, encoder in zip(self.family.texts, self.tokenizers, self.encoders):
            parts |= {text.encoder: encoder, text.tokenizer: tokenizer}
        return parts

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of each of B prompts, of T tokens after padding.

        Returns:
            (B, T, D), and pooled (B, P) or None, as the family's UNet takes them.
        """
        with_words = [index for index, prompt in enumerate(prompts) if self._tokenized(prompt)[1]]
        encoded = [None] * len(prompts)
        if with_words:
            features = self._encode([prompts[index] for index in with_words])
            for row, index in enumerate(with_words):
                encoded[index] = [None if part is None else part[row] for part in features]
        for index, prompt in enumerate(prompts):
            if encoded[index] is None:
                if prompt not in self.constant_features:
                    with torch.no_grad():
                        self.constant_features[prompt] = [
                            None if part is None else part[0] for part in self._encode([prompt])
                        ]
                encoded[index] = self.constant_features[prompt]
        features, pooled = zip(*encoded)
        return torch.stack(features), torch.stack(pooled) if self.family.pools else None

    def encode_ids(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `encode`, of (B, T) token ids for each encoder."""
        hidden_states = {} if self.family.layer is None else {"output_hidden_states": True}
        return self.family.join([encoder(own, **hidden_states) for encoder, own in zip(self.encoders, ids)])

    def _encode(self, prompts):
        tokenized = [self._tokenized(prompt)[0] for prompt in prompts]
        return self.encode_ids([torch.stack(ids) for ids in zip(*tokenized)])

    def _tokenized(self, prompt):
        """(T,) token ids for each encoder, on its device, and whether a modifier token is among them; kept by prompt."""
        if prompt not in self._ids:
            ids = [
                tokenizer(
                    prompt,
                    truncation=True,
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    return_tensors="pt",
                ).input_ids[0]
                for tokenizer in self.tokenizers
            ]
            has_word = any(
                not set(tokenizer.convert_tokens_to_ids(self.modifier_tokens)).isdisjoint(own.tolist())
                for tokenizer, own in zip(self.tokenizers, ids)
            )
            self._ids[prompt] = [_to_device(own, self.device) for own in ids], has_word
        return self._ids[prompt]


def _to_device(tensor, device):
    """Without waiting for what a GPU is doing, which a copy from ordinary memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
