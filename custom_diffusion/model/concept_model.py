"""The model that is taught, in one piece: UNet and text encoder with their trained parts."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.model.attention import trained_tensors
from custom_diffusion.model.tokens import modifier_embeddings
from custom_diffusion.weights.format import ConceptWeights


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter that is not trained."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class ConceptModel(nn.Module):
    """UNet and text encoder with their trained parts in one module, which is what accelerate prepares.

    Prompts without a modifier token have constant features: they are encoded once, one at a time, and kept.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase,
                 modifier_tokens: list[str]):  # fmt: skip
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.modifier_ids = set(tokenizer.convert_tokens_to_ids(modifier_tokens))
        self.constant_features = {}
        self._ids = {}

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def trained_tensors(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Copies on the CPU: the UNet's trained parameters by name, and the modifier tokens' rows (num_modifiers, dim)."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in trained_tensors(self.unet).items()}
        rows = modifier_embeddings(self.text_encoder)
        return tensors, torch.empty(0, 0) if rows is None else rows.detach().to("cpu", copy=True)

    @torch.no_grad()
    def load_trained(self, weights: ConceptWeights) -> None:
        """Copy weights that a run with the same flags has saved."""
        for name, parameter in trained_tensors(self.unet).items():
            parameter.copy_(weights.tensors[name])
        if weights.tokens:
            modifier_embeddings(self.text_encoder).copy_(torch.stack(list(weights.tokens.values())))

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Predict the noise (or velocity).

        Args:
            noisy_latents: (B, C, h, w). timesteps: (B,). prompts: B strings.
        Returns:
            (B, C, h, w) in the UNet's precision.
        """
        features = self.encode_prompts(prompts)
        return self.unet(noisy_latents.to(features.dtype), timesteps, features, return_dict=False)[0]

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """(B, T, D) text features of B prompts of T tokens after padding."""
        learned = [index for index, prompt in enumerate(prompts) if self._tokenized(prompt)[1]]
        features = [None] * len(prompts)
        if learned:
            for index, row in zip(learned, self._encode([prompts[index] for index in learned])):
                features[index] = row
        for index, prompt in enumerate(prompts):
            if features[index] is None:
                if prompt not in self.constant_features:
                    with torch.no_grad():
                        self.constant_features[prompt] = self._encode([prompt])[0]
                features[index] = self.constant_features[prompt]
        return torch.stack(features)

    def _encode(self, prompts):
        return self.text_encoder(torch.stack([self._tokenized(prompt)[0] for prompt in prompts]))[0]

    def _tokenized(self, prompt):
        """(T,) token ids on the text encoder's device, and whether a modifier token is among them; kept by prompt."""
        if prompt not in self._ids:
            ids = self.tokenizer(
                prompt,
                truncation=True,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
            has_modifier = not self.modifier_ids.isdisjoint(ids.tolist())
            self._ids[prompt] = _to_device(ids, self.text_encoder.device), has_modifier
        return self._ids[prompt]


def _to_device(tensor, device):
    """Without waiting for what a GPU is doing, which a copy from ordinary memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
