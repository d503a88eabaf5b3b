"""How alike images, texts and photos are, as the authors' customconcept101/evaluate.py measures it.

    CLIP-T   2.5 max(cos, 0) of an image and the text it was drawn from, without the modifier tokens; mean over images
    CLIP-I   cosine of CLIP's features of an image and a photo; mean over all pairs
    DINO     the same with DINO's features
    KID-CLIP kernel distance between CLIP's features of drawn and real class images, times 1000. The authors' script has none.

Images are resized and cropped with Pillow, whatever else is installed: other resizing moves the scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics.functional import pairwise_cosine_similarity
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import AutoModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.images import open_image

CLIP_SCORE_WEIGHT = 2.5
BATCH_SIZE = 32
DINO_RESIZE = 256 / 224  # the shorter side before the crop, in sides of the crop
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where torchvision is installed, transformers 5 resizes with it, unless asked for the Pillow one by this name.
PillowProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@dataclass
class ImageEncoder:
    """A vision model with its preprocessing; `features` of its output is (B, dim)."""

    model: torch.nn.Module
    processor: PillowProcessor
    features: str

    @torch.no_grad()
    def __call__(self, paths: Sequence[Path], flag: str) -> torch.Tensor:
        """Features of image files, (N, dim) float32 on the CPU. `flag` names the files in messages.

        Raises:
            InputError: a file cannot be decoded.
        """
        batches = []
        for start in range(0, len(paths), BATCH_SIZE):
            images = [_open(path, flag) for path in paths[start : start + BATCH_SIZE]]
            pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)
            features = getattr(self.model(pixel_values=pixels), self.features)
            # Models without a head have a vector for each patch; the first is that of the whole image.
            batches.append((features[:, 0] if features.dim() == 3 else features).cpu())
        return torch.cat(batches)


@dataclass
class TextEncoder:
    model: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts, (N, dim) float32 on the CPU. What is longer than CLIP reads is cut off."""
        batches = []
        for start in range(0, len(texts), BATCH_SIZE):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=self.model.config.max_position_embeddings,
                return_tensors="pt",
            )
            batches.append(self.model(**tokens.to(self.model.device)).text_embeds.cpu())
        return torch.cat(batches)


def _open(path, flag):
    try:
        return open_image(path)
    except Exception as error:  # Pillow raises many types on damaged files
        raise InputError(f"{flag}: '{path}' cannot be read ({first_line(error)}); remove or replace it") from None


def load_clip(name: str, device: torch.device) -> tuple[ImageEncoder, TextEncoder]:
    """CLIP by folder or Hub id, in float32. Raises InputError that names `--clip_model`."""
    with _loading("--clip_model", name, "CLIP"):
        vision = _complete(CLIPVisionModelWithProjection.from_pretrained(name, output_loading_info=True))
        text = _complete(CLIPTextModelWithProjection.from_pretrained(name, output_loading_info=True))
        tokenizer = CLIPTokenizer.from_pretrained(name)
    size = vision.config.image_size
    processor = PillowProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return ImageEncoder(vision.to(device), processor, "image_embeds"), TextEncoder(text.to(device), tokenizer)


def load_dino(name: str, device: torch.device) -> ImageEncoder:
    """DINO, or another ViT, by folder or Hub id, in float32. Raises InputError that names `--dino_model`."""
    with _loading("--dino_model", name, "DINO"):
        model = _complete(AutoModel.from_pretrained(name, output_loading_info=True))
        size = model.config.image_size
    # Not as the model's own files say: those on the Hub resize without a crop, the authors do not.
    processor = PillowProcessor(
        size={"shortest_edge": round(size * DINO_RESIZE)},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return ImageEncoder(model.to(device), processor, "last_hidden_state")


@contextmanager
def _loading(flag, name, kind) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, ValueError, RuntimeError, AttributeError and the Hub's own types
        raise InputError(
            f"{flag}: '{name}' cannot be loaded as a {kind} model ({first_line(error)}); "
            "connect to the Hub, or name the folder of one"
        ) from None


def _complete(loaded):
    """The model, or ValueError: transformers would only warn that weights are missing, and leave them random."""
    model, report = loaded
    missing = sorted(
        name for name in report["missing_keys"] if not name.startswith("pooler.")
    )  # which nothing here uses
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} first")
    return model.float().eval()


def text_cosines(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosine of each image and its own text: (N, dim), (N, dim) -> (N,)."""
    return cosine_similarity(image_features, text_features)


def clip_scores(cosines: torch.Tensor) -> torch.Tensor:
    """CLIP-T as the authors print it. Source: CLIPScore (arXiv 2104.08718), without its "A photo depicts"."""
    return CLIP_SCORE_WEIGHT * cosines.clamp(min=0)


def image_cosines(image_features: torch.Tensor, photo_features: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each image with every photo: (N, dim), (P, dim) -> (N,). Its mean is that over all pairs."""
    return pairwise_cosine_similarity(image_features, photo_features).mean(dim=1)


def kernel_distance(real: torch.Tensor, drawn: torch.Tensor) -> tuple[float, float]:
    """Kernel distance (KID) of two sets of features, (R, dim) and (D, dim), times 1000.

    Features are scaled to the length sqrt(dim), so that the kernel is (cos + 1)^3 for every model.

    Returns:
        Mean and standard deviation over 100 random subsets of the size of the smaller set; the same ones each time.
    Raises:
        ValueError: fewer than two of either.
    Source: Bińkowski et al., arXiv 1801.01401.
    """
    if min(len(real), len(drawn)) < 2:
        raise ValueError("the kernel distance needs two images of each kind")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory
        distance = KernelInceptionDistance(torch.nn.Identity(), subset_size=min(len(real), len(drawn)))
    for features, is_real in ((real, True), (drawn, False)):
        distance.update(normalize(features.double()) * features.shape[1] ** 0.5, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = distance.compute()
    return 1000 * mean.item(), 1000 * deviation.item()


@dataclass
class Scorer:
    """Everything that images are scored against, as features. `class_features` is None without class images."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    dino_encoder: ImageEncoder
    photo_features: torch.Tensor
    photo_dino_features: torch.Tensor
    class_features: torch.Tensor | None

    def image_scores(self, paths: Sequence[Path], texts: Sequence[str]) -> list[dict[str, float]]:
        """CLIP-T (as it is printed, and as the plain cosine), CLIP-I and DINO of each image; `texts`: what it should show."""
        features = self.image_encoder(paths, "--output")
        cosines = text_cosines(features, self.text_encoder(texts))
        columns = {
            "clip_t": clip_scores(cosines),
            "clip_t_cosine": cosines,
            "clip_i": image_cosines(features, self.photo_features),
            "dino": image_cosines(self.dino_encoder(paths, "--output"), self.photo_dino_features),
        }
        return [dict(zip(columns, values)) for values in zip(*(column.tolist() for column in columns.values()))]

    def forgetting(self, paths: Sequence[Path]) -> dict[str, float]:
        """The kernel distance of drawn class images to the real ones, with its deviation."""
        mean, deviation = kernel_distance(self.class_features, self.image_encoder(paths, "--output"))
        return {"kid_clip": mean, "kid_clip_deviation": deviation, "num_class_images": len(paths)}
