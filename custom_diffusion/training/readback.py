"""Proof that the folder holds what was trained: it is read back, and must predict the same noise."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from custom_diffusion.model.attention import remove_trained_projections
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.text_encoders import TextEncoders
from custom_diffusion.weights.pipeline import load_custom_diffusion

# Largest difference allowed, as a share of the largest prediction. The arithmetic is the same, its order may differ.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@torch.no_grad()
def predicts_finite(model: ConceptModel, prompt: str, latent_shape: tuple) -> bool:
    """Whether the model, as trained so far, predicts finite noise. `prompt` and `latent_shape` as in `read_back`."""
    return bool(model(*_probe(model, prompt, latent_shape)).isfinite().all())


def _probe(model, prompt, latent_shape):
    """What to compare predictions with: noisy latents, timesteps, prompts and time_ids."""
    device = next(model.unet.parameters()).device
    latents = torch.randn(latent_shape, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[512.0, 768.0, 0.0, 128.0, 512.0, 512.0]], device=device)
    return latents.to(device, model.text.dtype), torch.tensor([500], device=device), [prompt], time_ids


@torch.no_grad()
def read_back(
    folder: Path,
    model: ConceptModel,
    make_pipeline,
    tokenizers: list[PreTrainedTokenizerBase],
    prompt: str,
    latent_shape: tuple,
) -> DiffusionPipeline:
    """Take everything trained out of the model, load `folder` into it, and compare predictions before and after.

    Args:
        model: consumed; its modules live on in the pipeline.
        make_pipeline: (unet, text encoders) -> pipeline.
        tokenizers: without the modifier tokens.
        latent_shape: (1, C, h, w), of what the UNet takes.
    Returns:
        The pipeline, with the folder's weights loaded as any user would load them.
    Raises:
        RuntimeError: the predictions differ.
    """
    dtype = model.text.dtype
    probe = _probe(model, prompt, latent_shape)
    trained = model(*probe)
    remove_trained_projections(model.unet, dtype)
    model.text.remove_words()
    text = TextEncoders(model.text.family, tokenizers, model.text.encoders)
    pipeline = make_pipeline(model.unet, text)
    load_custom_diffusion(pipeline, folder)
    loaded = ConceptModel(pipeline.unet, text)(*probe)
    difference = (loaded - trained).abs().max() / trained.abs().max()
    if not difference <= TOLERANCE[dtype]:  # also when NaN
        raise RuntimeError(
            f"the weights in '{folder}' do not predict what was trained (relative difference {difference:.2g}); "
            "please report this"
        )
    return pipeline
