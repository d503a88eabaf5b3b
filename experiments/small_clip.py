# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""A CLIP and a vision transformer that know the demo's world alone: `python experiments/small_clip.py --output FOLDER`.

Not OpenAI's and Facebook's: they have seen nothing but drawings of one thing. The CLIP learns drawings and captions by its usual loss. The
other model learns without captions and takes DINO's place, but not by self-distillation: of two views of every drawing, cropped, shifted
and lit otherwise, it has to tell which belong together (contrastive, as in SimCLR). Both are folders of the ordinary layout, which
`custom-diffusion evaluate --clip_model FOLDER/clip --dino_model FOLDER/vit` takes. Some minutes of one core. Then they are checked
on what they have not seen.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import runs  # finds the demo
import torch
import torch.nn.functional as F
import world
from PIL import Image
from small_models import MAX_LENGTH, new_tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from custom_diffusion.evaluation.metrics import IMAGENET_MEAN, IMAGENET_STD, PillowProcessor, load_clip, load_dino
from custom_diffusion.files import whole_folder

WIDTH, PATCH = 64, 8
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
BATCH_SIZE, LEARNING_RATE = 128, 2e-3
CLIP_STEPS, VIT_STEPS = 400, 250
TEMPERATURE = 0.1  # of the views' cosines
ZOOM, SHIFT, LIGHT = 0.25, 6.0, 0.12  # of views: shares of the size and of the brightness, and pixels
CPU = torch.device("cpu")


def new_clip() -> CLIPModel:
    """Random weights; texts as the demo's tokenizer has them."""
    tokenizer = new_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LAYERS | ids | {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    vision = LAYERS | {"num_hidden_layers": 4, "image_size": world.SIZE, "patch_size": PATCH}
    projection = {"projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=text | projection, vision_config=vision | projection, **projection))


def new_vit() -> ViTModel:
    """Random weights; without a pooler, as DINO is."""
    config = ViTConfig(**LAYERS, num_hidden_layers=4, image_size=world.SIZE, patch_size=PATCH)
    return ViTModel(config, add_pooling_layer=False)


def drawn(rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """BATCH_SIZE drawings (B, 3, 64, 64) float in 0..1, each of one thing, and their captions; none that is held out."""
    samples = [world.random_sample(rng) for _ in range(BATCH_SIZE)]
    images = np.stack([world.draw(thing) for thing, _ in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, [spec.caption() for _, spec in samples]


def views(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Each image (B, 3, H, W) at another size and place and in another light, which changes no hue; normalized."""
    count, size = len(images), images.shape[-1]
    scale = 1 + ZOOM * (2 * torch.rand(count) - 1)
    shift = 2 * SHIFT / size * (2 * torch.rand(count, 2, 1) - 1)
    where = torch.cat([torch.diag_embed(scale[:, None].expand(count, 2)), shift], dim=2)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    seen = (seen * (1 + LIGHT * (2 * torch.rand(count, 1, 1, 1) - 1))).clamp(0, 1)
    return (seen - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def contrastive_loss(one: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """Which row of (B, dim) belongs to which of the other (B, dim), asked both ways; mean cross entropy."""
    logits = F.normalize(one) @ F.normalize(other).T / temperature
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(model: nn.Module, loss: Callable[[np.random.Generator], torch.Tensor], steps: int, name: str) -> None:
    """Minimize what `loss` says of a batch that it draws."""
    rng, losses = np.random.default_rng(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    for step in range(1, steps + 1):
        value = loss(rng)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(value.item())
        if step % 50 == 0:
            print(f"{name} step {step} loss {np.mean(losses[-50:]):.3f}", flush=True)


def train_clip(folder: Path, steps: int) -> None:
    """A CLIPModel with its tokenizer and preprocessing."""
    torch.manual_seed(0)
    model, tokenizer, processor = new_clip().train(), new_tokenizer(), PillowProcessor()

    def loss(rng):
        images, captions = drawn(rng)
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        pixels = views(images, processor.image_mean, processor.image_std)
        return model(**tokens, pixel_values=pixels, return_loss=True).loss

    train(model, loss, steps, "CLIP")
    size = {"height": world.SIZE, "width": world.SIZE}
    save(folder, model, tokenizer, PillowProcessor(size={"shortest_edge": world.SIZE}, crop_size=size))


def train_vit(folder: Path, steps: int) -> None:
    """A ViTModel with its preprocessing; what its features are compared through while learning is not kept."""
    torch.manual_seed(0)
    model = new_vit().train()
    head = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def loss(rng):
        images, _ = drawn(rng)
        one, other = (
            head(model(pixel_values=views(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0])
            for _ in range(2)
        )
        return contrastive_loss(one, other, TEMPERATURE)

    train(nn.ModuleList([model, head]), loss, steps, "ViT")
    size = {"height": world.SIZE, "width": world.SIZE}
    light = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    save(folder, model, PillowProcessor(size={"shortest_edge": world.SIZE}, crop_size=size, **light))


def save(folder: Path, *parts) -> None:
    """Whole or not at all, so that a folder that is there is a finished one."""
    with whole_folder(folder) as part:
        for one in parts:
            one.save_pretrained(part)


def trained(output: Path, clip_steps: int = CLIP_STEPS, vit_steps: int = VIT_STEPS) -> tuple[Path, Path]:
    """The folders of the two models, trained now if they are not there."""
    output.mkdir(parents=True, exist_ok=True)
    clip, vit = output / "clip", output / "vit"
    for folder, make, steps in ((clip, train_clip, clip_steps), (vit, train_vit, vit_steps)):
        if not folder.is_dir():
            make(folder, steps)
    return clip, vit


def thing_of(spec: world.Spec, rng: np.random.Generator) -> world.Thing:
    """One that a caption of named colours describes."""
    hue, edge = (
        None if name is None else world.HUES[name] + rng.uniform(-9.0, 9.0) for name in (spec.color, spec.edge)
    )
    return world.Thing(spec.shape, hue, edge, spec.background, **world.random_pose(rng))


def write_drawings(folder: Path, things: Sequence[world.Thing]) -> list[Path]:
    files = [folder / f"{i:04}.png" for i in range(len(things))]
    for file, thing in zip(files, things):
        Image.fromarray(world.draw(thing)).save(file)
    return files


def check_clip(folder: Path) -> dict[str, float]:
    """Percent of drawings whose caption is the nearest, or among the five nearest, of all the held-out ones; and the other way round."""
    rng, specs = np.random.default_rng(1), world.held_out_specs()
    images, texts = load_clip(str(folder), CPU)
    with TemporaryDirectory() as place:
        files = write_drawings(Path(place), [thing_of(spec, rng) for spec in specs])
        cosines = F.normalize(images(files, "")) @ F.normalize(texts([spec.caption() for spec in specs])).T
    scores = {"captions": len(specs)}
    for name, rows in (("caption of a drawing", cosines), ("drawing of a caption", cosines.T)):
        nearer = (rows > rows.diagonal()[:, None]).sum(1)
        scores |= {name: percent(nearer < 1), f"{name}, among five": percent(nearer < 5)}
    return scores


def check_vit(folder: Path, num_looks: int = 200) -> dict[str, float]:
    """Percent of drawings whose nearest neighbour has the same look: each look is drawn twice, at another place and size.

    Looks have any hue, named or not. Also with the second drawing on another background, as the photos of a concept are.
    """
    rng, scores = np.random.default_rng(1), {"looks": num_looks}
    encoder = load_dino(str(folder), CPU)
    firsts = [world.random_sample(rng)[0] for _ in range(num_looks)]
    grounds = list(world.BACKGROUNDS)
    for name, ahead in (("same look", 0), ("same look, another background", 1)):
        seconds = [
            replace(
                one,
                background=grounds[(grounds.index(one.background) + ahead) % len(grounds)],
                **world.random_pose(rng),
            )
            for one in firsts
        ]
        with TemporaryDirectory() as place:
            features = F.normalize(encoder(write_drawings(Path(place), [*firsts, *seconds]), ""))
        nearest = (features[:num_looks] @ features[num_looks:].T).argmax(1)
        scores[name] = percent(nearest == torch.arange(num_looks))
    return scores


def percent(right: torch.Tensor) -> float:
    return round(100 * right.float().mean().item(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=runs.absolute, default=runs.ROOT / "demo/output/small_clip")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the result does not depend on the machine
    clip, vit = trained(args.output)
    print(f"{clip}: {check_clip(clip)}\n{vit}: {check_vit(vit)}")


if __name__ == "__main__":
    main()
