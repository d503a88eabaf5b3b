"""Run a training script of diffusers where torchvision cannot be had, with stand-ins for the few transforms that it uses.

    python benchmarks/without_torchvision.py SCRIPT [FLAG...]

torchvision has no CPU build for every torch. The classes take Pillow pictures and do what torchvision's do.
"""

import runpy
import sys
from enum import Enum
from types import ModuleType

import numpy as np
import torch
from diffusers.utils import is_torchvision_available as diffusers_looks
from PIL import Image, ImageOps
from transformers.utils import is_torchvision_available as transformers_looks


class InterpolationMode(Enum):
    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return ImageOps.mirror(image) if torch.rand(1) < self.p else image


class Resize:
    """The shorter side to `size` pixels."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size, self.resample = size, interpolation.value

    def __call__(self, image):
        shorter = min(image.size)
        return image.resize(tuple(int(self.size * side / shorter) for side in image.size), self.resample)


def crop(image, top, left, height, width):
    return image.crop((left, top, left + width, top + height))


class _Crop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        left, top = (self.offset(side - self.size) for side in image.size)
        return crop(image, top, left, self.size, self.size)


class CenterCrop(_Crop):
    @staticmethod
    def offset(slack):
        return round(slack / 2)


class RandomCrop(_Crop):
    @staticmethod
    def offset(slack):
        return int(torch.randint(slack + 1, (1,)))

    @classmethod
    def get_params(cls, image, size):
        """Top, left, height and width of a crop of this (height, width)."""
        height, width = size
        return cls.offset(image.height - height), cls.offset(image.width - width), height, width


class ToTensor:
    """(3, H, W) float32 in [0, 1]."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, pixels):
        return (pixels - self.mean) / self.std


if __name__ == "__main__":
    transformers_looks(), diffusers_looks()  # both look once, and must not take these for torchvision
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    functional = ModuleType("torchvision.transforms.functional")
    package.transforms, transforms.functional, functional.crop = transforms, functional, crop
    for part in (InterpolationMode, Compose, RandomHorizontalFlip, Resize, CenterCrop, RandomCrop, ToTensor, Normalize):
        setattr(transforms, part.__name__, part)
    sys.modules |= {part.__name__: part for part in (package, transforms, functional)}
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
