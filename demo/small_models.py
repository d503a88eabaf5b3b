# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The demo's two small models, Stable Diffusion and SDXL: their parts, how text goes in, how they are saved and taken up again.

Both have the real ones' layout and differ from each other as those do: SDXL has two text encoders whose features before the last
layer are joined, the pooled features of the second, and six numbers that say how an image was cropped.
"""

from itertools import pairwise
from pathlib import Path

import torch
import world
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_LENGTH = 28  # tokens of a caption: the longest has 21 words, "a far away " before it, a start and an end
TEXT_WIDTH = 64
SECOND_TEXT_WIDTH = 96  # of the small SDXL's second text encoder, and of its pooled features
TIME_ID_WIDTH = 32  # of each of the six numbers' embedding


def new_vae() -> AutoencoderKL:
    """Factor 4: an image becomes (4, 16, 16)."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0  # little noise on the latents at first
    return vae.to(memory_format=torch.channels_last)


def new_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level vocabulary, with just the merges that make every caption word a single token."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges, pieces_made = [], []
    words = (*world.WORDS, *world.AUGMENTATION_WORDS, *world.PAIR_WORDS)
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            while (left, right) in pairwise(pieces):
                i = list(pairwise(pieces)).index((left, right))
                pieces[i : i + 2] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            pieces_made.append(pieces[0])
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *pieces_made, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
        pad_token=pad_token,
    )
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise AssertionError(f"not single tokens: {split}")
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, width: int, num_layers: int, **settings) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def _new_unet(**settings) -> UNet2DConditionModel:
    """Attention at 8x8 and 4x4, where an image's content is; convolutions alone at 16x16, where time would go."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        **settings,
    ).to(memory_format=torch.channels_last)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with the velocity as what the UNet predicts."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The small Stable Diffusion with fresh weights around `vae`."""
    tokenizer = new_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH, 3, num_attention_heads=4)),
        tokenizer=tokenizer,
        unet=_new_unet(cross_attention_dim=TEXT_WIDTH),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_sdxl_pipeline(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The small SDXL with fresh weights around `vae`; no layer is behind the first encoder's features but an unused one."""
    tokenizer, tokenizer_2 = new_tokenizer(), new_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH, 4, num_attention_heads=4)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text_config(tokenizer_2, SECOND_TEXT_WIDTH, 4, num_attention_heads=6, hidden_act="gelu")
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_new_unet(
            cross_attention_dim=TEXT_WIDTH + SECOND_TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=SECOND_TEXT_WIDTH + 6 * TIME_ID_WIDTH,
        ),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def is_sdxl(pipeline: DiffusionPipeline) -> bool:
    return isinstance(pipeline, StableDiffusionXLPipeline)


def learned_parts(pipeline: DiffusionPipeline) -> nn.ModuleList:
    """UNet and text encoders."""
    names = ("unet", "text_encoder", "text_encoder_2") if is_sdxl(pipeline) else ("unet", "text_encoder")
    return nn.ModuleList(getattr(pipeline, name) for name in names)


def tokenized(pipeline: DiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """(number of tokenizers, N, MAX_LENGTH) int64."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2) if is_sdxl(pipeline) else (pipeline.tokenizer,)
    return torch.stack(
        [t(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids for t in tokenizers]
    )


def encoded(parts: nn.ModuleList, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the UNet gets of a caption, as its pipeline would work it out.

    Args:
        parts: what `learned_parts` gives.
        input_ids: (number of tokenizers, B, MAX_LENGTH).
    Returns:
        Features (B, MAX_LENGTH, width), and for SDXL the pooled ones (B, SECOND_TEXT_WIDTH).
    """
    if len(parts) == 2:
        return parts[1](input_ids[0]).last_hidden_state, None
    first = parts[1](input_ids[0], output_hidden_states=True)
    second = parts[2](input_ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


@torch.no_grad()
def start_from(pipeline: DiffusionPipeline, folder: Path, captions: list[str]) -> None:
    """Take over the weights of the small Stable Diffusion in `folder` wherever `pipeline` has a place for them.

    Rows of tokens go by the token's text, new positions start as the last old one. In SDXL the first text encoder and all of the
    UNet take them; its keys and values are fitted to features without the final norm, and what is new starts as zero.

    Args:
        captions: what those are fitted on.
    """
    old = StableDiffusionPipeline.from_pretrained(folder)
    old_vocabulary, encoder = old.tokenizer.get_vocab(), old.text_encoder.state_dict()
    target = pipeline.text_encoder.state_dict()
    for name, weights in encoder.items():
        if name.endswith("token_embedding.weight"):
            for token, row in pipeline.tokenizer.get_vocab().items():
                if token in old_vocabulary:
                    target[name][row] = weights[old_vocabulary[token]]
        elif name.endswith("position_embedding.weight"):
            target[name][:] = weights[-1]
            target[name][: len(weights)] = weights
        else:
            target[name].copy_(weights)
    unet, fitted = pipeline.unet.state_dict(), None
    if is_sdxl(pipeline):
        states = pipeline.text_encoder(tokenized(pipeline, captions)[0], output_hidden_states=True).hidden_states[-2]
        features = pipeline.text_encoder.get_submodule(_final_norm(pipeline.text_encoder))(states)
        fitted = torch.linalg.lstsq(states.flatten(0, 1), features.flatten(0, 1)).solution
        unet["add_embedding.linear_2.weight"].zero_()
        unet["add_embedding.linear_2.bias"].zero_()
    for name, weights in old.unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and fitted is not None:
            unet[name].zero_()
            unet[name][:, :TEXT_WIDTH] = weights @ fitted.T
        else:
            unet[name].copy_(weights.reshape(unet[name].shape))


def _final_norm(text_encoder: CLIPTextModel) -> str:
    return next(name for name, _ in text_encoder.named_modules() if name.endswith("final_layer_norm"))


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Half-precision files that load in full precision when no dtype is asked for."""
    pipeline.to(torch.float16).save_pretrained(folder)
    for suffix in ("", "_2") if is_sdxl(pipeline) else ("",):
        # transformers, unlike diffusers, would load a text encoder in the precision it was saved with.
        config = folder / f"text_encoder{suffix}" / "config.json"
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
        # For older versions of transformers: vocab.json and merges.txt, and the names that the weights had before 5.6.
        getattr(pipeline, f"tokenizer{suffix}").backend_tokenizer.model.save(str(folder / f"tokenizer{suffix}"))
        weights = folder / f"text_encoder{suffix}" / "model.safetensors"
        tensors = load_file(weights)
        renamed = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
            for name, tensor in tensors.items()
        }
        save_file(renamed, weights, metadata={"format": "pt"})
