# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Train the demo's small Stable Diffusion from scratch on the picture world, and save it in the ordinary diffusers layout.

    python demo/train_base.py --output demo/model --work_dir demo/output/base

First the autoencoder learns the pictures, then UNet and text encoder learn together from cached latents and captions.
Both stages go on from their last checkpoint in `--work_dir` when started again. `check_model.py` tells how good it is.
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from judge import score_captions
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_LENGTH = 16  # tokens of a caption: the longest has 13 words, and a start and an end
TEXT_WIDTH = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/model"))
    parser.add_argument(
        "--work_dir", type=Path, default=Path("demo/output/base"), help="checkpoints and cached latents"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_pictures", type=int, default=40_000)
    parser.add_argument("--vae_steps", type=int, default=1_100)
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5_000, help="steps of UNet and text encoder")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    return parser.parse_args()


def draw_pictures(num_pictures: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (num_pictures, 64, 64, 3) uint8 and their captions."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((num_pictures, world.SIZE, world.SIZE, 3), np.uint8)
    captions = []
    for i in range(num_pictures):
        thing, spec = world.random_sample(rng)
        pictures[i] = world.draw(thing)
        captions.append(spec.caption())
    return pictures, captions


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float in -1..1, channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cosine_rate(step: int, num_steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def new_vae() -> AutoencoderKL:
    """Factor 4: a picture becomes (4, 16, 16)."""
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


def save_state(path: Path, **state) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_vae(pictures: np.ndarray, args: argparse.Namespace) -> AutoencoderKL:
    """Pixel losses and a light KL term, which makes the decoder robust to small errors.

    Three of the four latent channels are drawn towards the picture made small, strongly at first: left alone, colours take
    far longer to get through the group norms than outlines do.
    """
    torch.manual_seed(args.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    path, first_step = args.work_dir / "vae.pt", 0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    start = time.time()
    for step in range(first_step, args.vae_steps):
        rng = np.random.default_rng((args.seed, 1, step))
        x = to_tensor(pictures[rng.integers(len(pictures), size=args.vae_batch_size)])
        posterior = vae.encode(x).latent_dist
        torch.manual_seed(args.seed * 1_000_003 + step)
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        small = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(x, 4))
        loss = mse + 0.5 * F.l1_loss(reconstruction, x) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss = loss + max(0.02, 1 - step / 400) * small
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, args.vae_steps, 1.5e-3)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            print(f"autoencoder step {step + 1} psnr {psnr:.1f} dB {time.time() - start:.0f} s", flush=True)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
            save_state(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Mean latents of all pictures, (N, 4, 16, 16), scaled to unit variance; the scale goes into the config of `vae`."""
    latents = [vae.encode(to_tensor(pictures[i : i + 64])).latent_dist.mean for i in range(0, len(pictures), 64)]
    latents = torch.cat(latents).contiguous()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    return latents * vae.config.scaling_factor


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level vocabulary, with just the merges that make every caption word a single token."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges, pieces_made = [], []
    words = (*world.WORDS, *world.AUGMENTATION_WORDS)
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
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH
    )
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise AssertionError(f"not single tokens: {split}")
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Attention at 8x8 and 4x4, where a picture's content is; convolutions alone at 16x16, where time would go."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
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


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(0.999, (1 + step) / (10 + step))
    averaged, current = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - decay)


def train_unet(
    vae: AutoencoderKL, latents: torch.Tensor, captions: list[str], args: argparse.Namespace
) -> StableDiffusionPipeline:
    """UNet and text encoder together, one caption in ten emptied; what is kept is the running average of the weights."""
    torch.manual_seed(args.seed + 1)
    tokenizer, scheduler = new_tokenizer(), new_scheduler()
    model = nn.ModuleList([new_unet(), new_text_encoder(tokenizer)])
    average = nn.ModuleList([new_unet(), new_text_encoder(tokenizer)]).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    unet, text_encoder = model
    pipeline = make_pipeline(vae, average, tokenizer, scheduler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty_ids = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    path, first_step = args.work_dir / "unet.pt", 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    losses, start = [], time.time()
    for step in range(first_step, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (args.batch_size,))
        x = latents[chosen].contiguous(memory_format=torch.channels_last)
        ids = torch.where(torch.rand(args.batch_size, 1) < 0.1, empty_ids, input_ids[chosen])
        # More of the noisy steps, where the caption decides what the picture will be.
        timesteps = (1000 * torch.rand(args.batch_size) ** 0.7).long()
        noise = torch.randn_like(x)
        model_pred = unet(scheduler.add_noise(x, noise, timesteps), timesteps, text_encoder(ids)[0]).sample
        loss = F.mse_loss(model_pred, scheduler.get_velocity(x, noise, timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, args.steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, step)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"unet step {step + 1} loss {np.mean(losses[-100:]):.4f} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, step=step + 1, **state)
            specs = world.held_out_specs()[:: 4 if step + 1 < args.steps else 1]
            print("held-out captions", score_captions(pipeline, specs, args.seed), flush=True)
    return pipeline


def make_pipeline(vae, average, tokenizer, scheduler) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=average[1].eval(),
        tokenizer=tokenizer,
        unet=average[0].eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Half-precision files that load in full precision when no dtype is asked for."""
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers, unlike diffusers, would load the text encoder in the precision it was saved with.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    # For older versions of transformers: vocab.json and merges.txt, and the names that the weights had before 5.6.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def main() -> None:
    args = parse_args()
    path = args.work_dir / "latents.pt"
    if path.exists():
        vae = new_vae()
        vae.load_state_dict(torch.load(args.work_dir / "vae.pt")["model"])
        state = torch.load(path)
        latents, captions = state["latents"], state["captions"]
        vae.register_to_config(scaling_factor=state["scaling_factor"])
    else:
        pictures, captions = draw_pictures(args.num_pictures, args.seed)
        vae = train_vae(pictures, args)
        latents = encode_latents(vae, pictures)
        save_state(path, latents=latents, captions=captions, scaling_factor=vae.config.scaling_factor)
    print(f"latents of {len(latents)} pictures, scaling factor {vae.config.scaling_factor}", flush=True)
    pipeline = train_unet(vae, latents, captions, args)
    save_pipeline(pipeline, args.output)


if __name__ == "__main__":
    main()
