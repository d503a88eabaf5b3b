"""The model that is taught, in one piece: UNet and text encoders with their trained parts."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from custom_diffusion.model.attention import trained_tensors
from custom_diffusion.model.text_encoders import TextEncoders
from custom_diffusion.weights.format import ConceptWeights


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter that is not trained."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class ConceptModel(nn.Module):
    """UNet and text encoders with their trained parts in one module, which is what accelerate prepares."""

    def __init__(self, unet: UNet2DConditionModel, text: TextEncoders):
        super().__init__()
        self.unet = unet
        self.text = text

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def trained_weights(self, config: dict) -> ConceptWeights:
        """All that is trained, on the CPU, to be written before a further step; a word's rows in several encoders are joined to one.

        A model that is on the CPU itself shares its tensors with them.
        """
        tensors = {name: p.detach().cpu() for name, p in trained_tensors(self.unet).items()}
        rows = [rows.detach().cpu() for rows in self.text.trained_rows()]
        tokens = dict(zip(self.text.modifier_tokens, torch.cat(rows, dim=1))) if rows else {}
        widths = self.text.widths if tokens and len(self.text.widths) > 1 else ()
        return ConceptWeights(tensors, tokens, config, token_widths=widths)

    @torch.no_grad()
    def load_trained(self, weights: ConceptWeights) -> None:
        """Copy weights that a run with the same flags has saved."""
        for name, parameter in trained_tensors(self.unet).items():
            parameter.copy_(weights.tensors[name])
        if weights.tokens:
            rows = torch.stack(list(weights.tokens.values())).split(self.text.widths, dim=1)
            for own, saved in zip(self.text.trained_rows(), rows):
                own.copy_(saved)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: list[str],
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the noise (or velocity).

        Args:
            noisy_latents: (B, C, h, w). timesteps: (B,). prompts: B strings.
            time_ids: (B, 6), as in `Family.added_conditions`; families without such conditions pass over it.
        Returns:
            (B, C, h, w) in the UNet's precision.
        """
        features, pooled = self.text.encode(prompts)
        added = self.text.family.added_conditions(pooled, time_ids)
        return self.unet(
            noisy_latents.to(features.dtype), timesteps, features, added_cond_kwargs=added, return_dict=False
        )[0]
