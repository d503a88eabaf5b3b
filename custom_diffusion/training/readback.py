"""Proof that the folder holds what was trained: it is read back, and must predict the same noise."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import PreTrainedTokenizerBase

from custom_diffusion.model.attention import remove_trained_projections
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.tokens import remove_modifier_tokens
from custom_diffusion.weights.pipeline import load_custom_diffusion

# Largest difference allowed, as a share of the largest prediction. The arithmetic is the same, its order may differ.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@torch.no_grad()
def predicts_finite(model: ConceptModel, prompt: str, latent_shape: tuple) -> bool:
    """Whether the model, as trained so far, predicts finite noise. `prompt` and `latent_shape` as in `read_back`."""
    return bool(model(*_probe(model, latent_shape), [prompt]).isfinite().all())


def _probe(model, latent_shape):
    """Noisy latents and a timestep to compare predictions with."""
    device = next(model.unet.parameters()).device
    latents = torch.randn(latent_shape, generator=torch.Generator().manual_seed(0))
    return latents.to(device, model.text_encoder.dtype), torch.tensor([500], device=device)


@torch.no_grad()
def read_back(
    folder: Path,
    model: ConceptModel,
    make_pipeline,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    latent_shape: tuple,
) -> StableDiffusionPipeline:
    """Take everything trained out of the model, load `folder` into it, and compare predictions before and after.

    Args:
        model: consumed; its modules live on in the pipeline.
        make_pipeline: (unet, text_encoder, tokenizer) -> pipeline.
        tokenizer: without the modifier tokens.
        latent_shape: (1, C, h, w).
    Returns:
        The pipeline, with the folder's weights loaded as any user would load them.
    Raises:
        RuntimeError: the predictions differ.
    """
    dtype = model.text_encoder.dtype
    latents, timesteps = _probe(model, latent_shape)
    trained = model(latents, timesteps, [prompt])
    remove_trained_projections(model.unet, dtype)
    remove_modifier_tokens(model.text_encoder)
    pipeline = make_pipeline(model.unet, model.text_encoder, tokenizer)
    load_custom_diffusion(pipeline, folder)
    features = ConceptModel(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, []).encode_prompts([prompt])
    loaded = pipeline.unet(latents, timesteps, features, return_dict=False)[0]
    difference = (loaded - trained).abs().max() / trained.abs().max()
    if not difference <= TOLERANCE[dtype]:  # also when NaN
        raise RuntimeError(
            f"the weights in '{folder}' do not predict what was trained (relative difference {difference:.2g}); "
            "please report this"
        )
    return pipeline
