"""Make a Stable Diffusion model of SD 1.4's exact size with random weights, and pictures to train on, for benchmarks."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 49_408


def make_sd14_size_model(folder: Path) -> Path:
    """860 M parameters in the UNet, 123 M in the text encoder, 84 M in the VAE: 4.3 GB in float32.

    The tokenizer is the demo's, padded to 77 tokens and filled up to CLIP's 49,408 words: scripts cut the embedding table
    to what the tokenizer has.
    """
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_tokenizer() -> CLIPTokenizer:
    """The demo's words, and others that no caption has."""
    words = json.loads((ROOT / "demo/model/tokenizer/vocab.json").read_text(encoding="utf-8"))
    words |= {f"unused{index}</w>": index for index in range(len(words), VOCABULARY)}
    merges = (ROOT / "demo/model/tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in merges if not line.startswith("#version")]
    return CLIPTokenizer(vocab=words, merges=pairs, model_max_length=77)


def make_data(folder: Path, num_class_images: int, size: int = 640) -> Path:
    """photos/ (5 pictures) and class/ in the layout of `retrieve.py`, with absolute paths, which older scripts need."""
    rng = np.random.default_rng(0)
    for sub, count in (("photos", 5), ("class/images", num_class_images)):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            blocks = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
            blocks.resize((size, size), Image.Resampling.BICUBIC).save(folder / sub / f"{index}.jpg")
    paths = [str((folder / "class/images" / f"{index}.jpg").resolve()) for index in range(num_class_images)]
    (folder / "class/images.txt").write_text("".join(f"{path}\n" for path in paths))
    (folder / "class/caption.txt").write_text("".join(f"photo of a circle {i}\n" for i in range(num_class_images)))
    (folder / "class/urls.txt").write_text("".join(f"http://localhost/{i}\n" for i in range(num_class_images)))
    return folder
