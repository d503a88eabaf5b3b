"""Make models of the exact size of SD 1.4 and SDXL with random weights, and images to train on, for benchmarks."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 49_408
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PUBLISHED = ROOT / "custom_diffusion/model/published"


def make_sd14_size_model(folder: Path, device: str = "cpu") -> Path:
    """860 M parameters in the UNet, 123 M in the text encoder, 84 M in the VAE: 4.3 GB in float32.

    The tokenizer is the demo's, padded to 77 tokens and filled up to CLIP's 49,408 words: scripts cut the embedding table
    to what the tokenizer has.

    Args:
        device: on which the random numbers are drawn.
    """
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    with torch.device(device):
        text_encoder = CLIPTextModel(text_config(tokenizer, sizes("sd1", "text_encoder")))
        unet = UNet2DConditionModel(**sizes("sd1", "unet"))
        vae = AutoencoderKL(**sizes("sd1", "vae"))
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_sdxl_size_model(folder: Path, device: str = "cpu") -> Path:
    """2,567 M parameters in the UNet, 123 and 695 M in the text encoders, 84 M in the VAE: 6.9 GB in float16.

    Args:
        device: on which the random numbers are drawn.
    """
    parts = {name: sizes("sdxl", name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return _make_sdxl(folder, parts, device, torch.float16)


def make_tiny_sdxl_model(folder: Path, device: str = "cpu") -> Path:
    """The same architecture, of 64 pixels and a few megabytes."""
    unet = sizes("sdxl", "unet") | {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "norm_num_groups": 8,
    }
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vae = sizes("sdxl", "vae") | {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8, "sample_size": 64}
    texts = {"text_encoder": small, "text_encoder_2": small | {"projection_dim": 32}}
    return _make_sdxl(folder, {"unet": unet, "vae": vae, **texts}, device, torch.float32)


def _make_sdxl(folder, parts, device, dtype):
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    # The second one pads with "!", the first word of CLIP's vocabulary.
    second = make_tokenizer(pad_token="!")
    with torch.device(device):
        text_encoder = CLIPTextModel(text_config(tokenizer, parts["text_encoder"])).to(dtype)
        text_encoder_2 = CLIPTextModelWithProjection(text_config(second, parts["text_encoder_2"])).to(dtype)
        unet = UNet2DConditionModel(**parts["unet"]).to(dtype)
        vae = AutoencoderKL(**parts["vae"]).to(dtype)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def sizes(model: str, part: str) -> dict:
    """The configuration of a published model's part, as far as it differs from the libraries' defaults."""
    config = json.loads((PUBLISHED / model / part / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if name not in ("_class_name", "model_type")}


def text_config(tokenizer: CLIPTokenizer, sizes: dict) -> CLIPTextConfig:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 77, **sizes, **ids})


def make_tokenizer(**special: str) -> CLIPTokenizer:
    """The demo's words, and others that no caption has; `special` tokens, such as `pad_token`, that are not CLIP's."""
    words = json.loads((ROOT / "demo/model/tokenizer/vocab.json").read_text(encoding="utf-8"))
    words |= {f"unused{index}</w>": index for index in range(len(words), VOCABULARY)}
    merges = (ROOT / "demo/model/tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in merges if not line.startswith("#version")]
    return CLIPTokenizer(vocab=words, merges=pairs, model_max_length=77, **special)


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
