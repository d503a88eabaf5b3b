# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Train one of the demo's small models on their world, and save it in the ordinary diffusers layout.

    python demo/train_base.py --output demo/model --work_dir demo/output/base
    python demo/train_base.py --output demo/model_sdxl --work_dir demo/output/base_sdxl --sdxl --start_from demo/model

First the autoencoder learns the images, then UNet and text encoders learn together from cached latents and captions. With
`--start_from` the weights of a small Stable Diffusion are taken up, its autoencoder's encoder stays as it is, and the decoder alone
learns on. Both stages go on from their last checkpoint in `--work_dir` when started again. `check_model.py` tells how good it is.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from check_model import score_model
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from small_models import (
    encoded,
    is_sdxl,
    learned_parts,
    new_pipeline,
    new_sdxl_pipeline,
    new_vae,
    save_pipeline,
    start_from,
    tokenized,
)
from torch import nn

PAIR_SHARE = 0.38  # of the images, two things
PAIR_WEIGHT = (
    2.5  # how much more often one of them is shown than one of the others: 60 % of what UNet and text encoders see
)
WHOLE = (world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE)  # original height and width, crop top and left, target


@dataclass
class Drawn:
    """Images (N, 64, 64, 3) uint8, their captions, time_ids (N, 6) float (see `WHOLE`) and weights (N,) in sampling."""

    images: np.ndarray
    captions: list[str]
    time_ids: torch.Tensor
    weights: torch.Tensor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/model"))
    parser.add_argument(
        "--work_dir", type=Path, default=Path("demo/output/base"), help="checkpoints and cached latents"
    )
    parser.add_argument("--sdxl", action="store_true", help="the small SDXL, which also sees cropped images")
    parser.add_argument(
        "--start_from", type=Path, help="folder of a small Stable Diffusion whose weights to begin with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=40_000)
    parser.add_argument("--vae_steps", type=int, default=1_100)
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--vae_learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--steps", type=int, default=5_000, help="steps of UNet and text encoders")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    return parser.parse_args()


def draw_images(num_images: int, seed: int, views: bool) -> Drawn:
    """Images of one thing or two; with `views`, each as a file of some size that was resized and cropped."""
    rng = np.random.default_rng(seed)
    images = np.empty((num_images, world.SIZE, world.SIZE, 3), np.uint8)
    captions, time_ids, weights = [], [], []
    for i in range(num_images):
        if rng.random() < PAIR_SHARE:
            things, spec = world.random_pair(rng)
        else:
            thing, spec = world.random_sample(rng)
            things = (thing,)
        images[i], ids = random_view(things, rng) if views else (world.draw(*things), WHOLE)
        captions.append(spec.caption())
        time_ids.append(ids)
        weights.append(PAIR_WEIGHT if len(things) == 2 else 1.0)
    return Drawn(images, captions, torch.tensor(time_ids, dtype=torch.float32), torch.tensor(weights))


def random_view(things: tuple[world.Thing, ...], rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """An image (64, 64, 3) uint8 and its time_ids, told as they are: half of the images whole as drawn, a third cropped.

    A file of `original` pixels is resized to `size` and cropped to 64. Top and left are never both 0 in what is cropped, so
    that (0, 0) always means a whole image.
    """
    kind, size, top, left = rng.random(), world.SIZE, 0, 0
    original = size if kind < 0.5 else int(rng.integers(48, 129))
    if kind >= 0.65:
        size = int(rng.integers(68, 97))
        original = (world.SIZE, size, original)[int(rng.integers(3))]
        while top + left == 0:
            top, left = (int(offset) for offset in rng.integers(size - world.SIZE + 1, size=2))
    image = Image.fromarray(world.draw(*things, size=original)).resize((size, size), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + world.SIZE, top + world.SIZE))
    return np.asarray(image), (original, original, top, left, world.SIZE, world.SIZE)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float in -1..1, channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cosine_rate(step: int, num_steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def save_state(path: Path, **state) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_vae(vae: AutoencoderKL, images: np.ndarray, args: argparse.Namespace) -> None:
    """Pixel losses and a light KL term, which makes the decoder robust to small errors.

    Three of the four latent channels are drawn towards the image made small, strongly at first: left alone, colours take
    far longer to get through the group norms than outlines do.
    """
    torch.manual_seed(args.seed)
    if args.start_from:  # a UNet knows these latents
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    path, first_step = args.work_dir / "vae.pt", 0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    start = time.time()
    for step in range(first_step, args.vae_steps):
        rng = np.random.default_rng((args.seed, 1, step))
        x = to_tensor(images[rng.integers(len(images), size=args.vae_batch_size)])
        posterior = vae.encode(x).latent_dist
        torch.manual_seed(args.seed * 1_000_003 + step)
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        small = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(x, 4))
        loss = mse + 0.5 * F.l1_loss(reconstruction, x) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss = loss + max(0.02, 1 - step / 400) * small
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, args.vae_steps, args.vae_learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            print(f"autoencoder step {step + 1} psnr {psnr:.1f} dB {time.time() - start:.0f} s", flush=True)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
            save_state(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Mean latents of all images, (N, 4, 16, 16), unscaled."""
    latents = [vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(latents).contiguous()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(0.999, (1 + step) / (10 + step))
    averaged, current = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - decay)


def predict(
    parts: nn.ModuleList, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, time_ids: torch.Tensor
) -> torch.Tensor:
    """The UNet's prediction, with one caption in ten left out the way guidance leaves it out: an empty one, in SDXL zeros."""
    features, pooled = encoded(parts, ids)
    if pooled is None:
        return parts[0](noisy, timesteps, features).sample
    kept = (torch.rand(len(noisy)) >= 0.08).float()
    added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
    return parts[0](noisy, timesteps, features * kept[:, None, None], added_cond_kwargs=added).sample


def train_unet(pipeline: DiffusionPipeline, latents: torch.Tensor, drawn: Drawn, args: argparse.Namespace) -> None:
    """UNet and text encoders together; `pipeline` is left with the running average of the weights."""
    torch.manual_seed(args.seed + 1)
    build = new_sdxl_pipeline if args.sdxl else new_pipeline
    average = learned_parts(pipeline).requires_grad_(False).eval()
    model = learned_parts(build(pipeline.vae)).requires_grad_(True).train()
    model.load_state_dict(average.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    input_ids, empty_ids = tokenized(pipeline, drawn.captions), tokenized(pipeline, [""])
    empty_share = 0.03 if is_sdxl(pipeline) else 0.1
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
        chosen = torch.multinomial(drawn.weights, args.batch_size, replacement=True)
        x = latents[chosen].contiguous(memory_format=torch.channels_last)
        ids = torch.where(torch.rand(args.batch_size, 1) < empty_share, empty_ids, input_ids[:, chosen])
        # More of the noisy steps, where the caption decides what the image will be.
        timesteps = (1000 * torch.rand(args.batch_size) ** 0.7).long()
        noise = torch.randn_like(x)
        noisy = pipeline.scheduler.add_noise(x, noise, timesteps)
        model_pred = predict(model, noisy, timesteps, ids, drawn.time_ids[chosen])
        loss = F.mse_loss(model_pred, pipeline.scheduler.get_velocity(x, noise, timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, args.steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, step)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"unet step {step + 1} loss {np.mean(losses[-50:]):.4f} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, step=step + 1, **state)
            print("held-out captions", score_model(pipeline, args.seed, every=5), flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    vae = new_vae()
    if args.start_from:
        old_vae = AutoencoderKL.from_pretrained(args.start_from / "vae")
        vae.load_state_dict(old_vae.state_dict())
        vae.register_to_config(scaling_factor=old_vae.config.scaling_factor)
    drawn = draw_images(args.num_images, args.seed, views=args.sdxl)
    train_vae(vae, drawn.images, args)
    path = args.work_dir / "latents.pt"
    if path.exists():
        latents = torch.load(path)["latents"]
    else:
        latents = encode_latents(vae, drawn.images)
        save_state(path, latents=latents)
    if not args.start_from:
        vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    print(f"latents of {len(latents)} images, scaling factor {vae.config.scaling_factor}", flush=True)
    pipeline = new_sdxl_pipeline(vae) if args.sdxl else new_pipeline(vae)
    pipeline.set_progress_bar_config(disable=True)
    if args.start_from:
        start_from(pipeline, args.start_from, drawn.captions[:500])
    train_unet(pipeline, latents * vae.config.scaling_factor, drawn, args)
    save_pipeline(pipeline, args.output)


if __name__ == "__main__":
    main()
