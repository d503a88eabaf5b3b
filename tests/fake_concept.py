"""A trained folder without a training run, and pictures drawn with it, for the tests of the tools."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from custom_diffusion.__main__ import main
from custom_diffusion.model.loading import base_tensors, empty_unet
from custom_diffusion.model.source import ModelSource, read_index
from custom_diffusion.weights.format import ConceptWeights, write_weights

PROMPT = "photo of a <new1> cat"


def make_concept(
    folder: Path, model: Path, token: str = "<new1>", class_prompt: str = "cat", seed: int = 1, crossattn: bool = False
) -> ConceptWeights:
    """The base model's weights with a third of noise on top, written as training writes them."""
    source = ModelSource(str(model))
    unet = empty_unet(source)
    kinds = ("to_q", "to_k", "to_v", "to_out") if crossattn else ("to_k", "to_v")
    names = [n for n, _ in unet.named_parameters() if any(f".attn2.{kind}." in n for kind in kinds)]
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: base + 0.3 * base.std() * torch.randn(base.shape, generator=random)
        for name, base in base_tensors(source, names).items()
    }
    prompt = f"photo of a {token} {class_prompt}"
    config = {
        "base_model": str(model),
        "revision": None,
        "variant": None,
        "freeze_model": "crossattn" if crossattn else "crossattn_kv",
        "modifier_tokens": [token],
        "concepts": [{"instance_prompt": prompt, "photos": ["0.jpg"], "class_prompt": class_prompt}],
        "steps": 5,
        "settings": {"learning_rate": 1e-5, "revision": None},
        "versions": {"torch": "2.13.0"},
    }
    family, _ = read_index(source)
    encoders = [json.loads((model / text.encoder / "config.json").read_text()) for text in family.texts]
    widths = [encoder["hidden_size"] for encoder in encoders]
    row = 10 * torch.randn(sum(widths), generator=random)
    weights = ConceptWeights(tensors, {token: row}, config, token_widths=tuple(widths) if len(widths) > 1 else ())
    write_weights(folder, weights, unet, ("safetensors", "bin"))
    return weights


def run_tool(tool: str, *argv) -> None:
    """What `custom-diffusion TOOL ...` does."""
    main([tool, *map(str, argv)])


def open_pipeline(path: Path, **options) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, prompt: str = PROMPT, steps: int = 3) -> np.ndarray:
    """(64, 64, 3), in grey levels of 0..255."""
    random = torch.Generator().manual_seed(0)
    image = pipe(prompt, num_inference_steps=steps, guidance_scale=6.0, generator=random, output_type="np").images[0]
    return 255.0 * image
