"""Tiny random Stable Diffusion models and pictures, made in a second, for tests."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)

WORDS = ["photo", "of", "a", "cat", "wooden", "pot", "person", "ktn", "pll", "ucd", "sitting", "in", "bucket", "the"]


def make_tokenizer(folder: Path, **options) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with every word of WORDS as one token, through real merge rules."""
    characters = [chr(c) for c in range(33, 127)]
    vocabulary = {symbol: i for i, symbol in enumerate(characters + [c + "</w>" for c in characters])}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16, **options)


def make_model(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, width: int = 32, *, in_channels: int = 4
) -> Path:
    """A random model of SD's architecture: 64 px, latents 16 x 16, six attentions, all in the diffusers layout.

    With 9 input channels it is an inpainting model.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    vae = make_vae()
    # Random attention is nearly uniform; sharper text features make prompts matter as they do in a real model.
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(20)
    pipeline = (StableDiffusionInpaintPipeline if in_channels == 9 else StableDiffusionPipeline)(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
            clip_sample=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def make_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=64, **options,
    )  # fmt: skip


def make_xl_model(folder: Path, prediction_type: str = "epsilon", seed: int = 0, *, in_channels: int = 4) -> Path:
    """A random model of SDXL's architecture: 64 px, latents 16 x 16, seven attentions, text encoders of 32 and 40 values.

    As in SDXL itself, the second tokenizer pads with "!", and the text encoders' configuration names 2 as the end token.
    """
    torch.manual_seed(seed)
    tokenizers = [make_tokenizer(folder / "tokenizer"), make_tokenizer(folder / "tokenizer_2", pad_token="!")]
    encoders = [
        kind(
            CLIPTextConfig(
                vocab_size=len(tokenizers[0]), hidden_size=width, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=16, projection_dim=24, bos_token_id=0, eos_token_id=2,
                pad_token_id=1, hidden_act=activation,
            )
        )
        for kind, width, activation in ((CLIPTextModel, 32, "quick_gelu"), (CLIPTextModelWithProjection, 40, "gelu"))
    ]  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=72,
        attention_head_dim=(4, 8), norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    with torch.no_grad():
        for encoder in encoders:
            encoder.get_input_embeddings().weight.mul_(20)
    pipeline = (StableDiffusionXLInpaintPipeline if in_channels == 9 else StableDiffusionXLPipeline)(
        vae=make_vae(scaling_factor=0.13025), text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
            timestep_spacing="leading", steps_offset=1,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP that sees 32 pixels in patches of 8, and makes 24 features."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": 24, **ids}
    vision = {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=24)).save_pretrained(
        folder
    )
    return folder


def make_dino(folder: Path, seed: int = 0) -> Path:
    """A random ViT that sees 28 pixels in patches of 7, saved without a pooler as DINO's are."""
    torch.manual_seed(seed)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(**layers, image_size=28, patch_size=7), add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_pictures(
    folder: Path, count: int, size: tuple[int, int] = (90, 70), seed: int = 0, suffix: str = ".jpg"
) -> Path:
    """Pictures of random blocks, `size` = (width, height) pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        blocks = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8))
        blocks.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}{suffix}")
    return folder


def make_class_folder(folder: Path, count: int, caption: str = "photo of a cat {}", seed: int = 1) -> Path:
    """Class images in the layout that `retrieve.py` writes."""
    make_pictures(folder / "images", count, seed=seed)
    (folder / "images.txt").write_text("".join(f"images/{i}.jpg\n" for i in range(count)))
    (folder / "caption.txt").write_text("".join(caption.format(i) + "\n" for i in range(count)))
    (folder / "urls.txt").write_text("".join(f"http://localhost/{i}.jpg\n" for i in range(count)))
    return folder
