"""A whole model in one `.safetensors` file, in the original layout, and what else such a file may be: told from its header.

On a floor of its own above the ground, because the flags' checks, the model and the tools all ask it, before anything heavy is
imported.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from custom_diffusion.families import STABLE_DIFFUSION, SUPPORTED, closest_family, missing_parts, what_it_is

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNET_PREFIX = "model.diffusion_model."
_CONV_IN = f"{UNET_PREFIX}input_blocks.0.0.weight"
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_TRAINABLE = {"F16", "BF16", "F32", "F64"}
# What the parts of a pipeline are called, by the names that their weights begin with.
_PARTS = {
    f"{UNET_PREFIX}input_blocks.": ("unet",),
    "first_stage_model.": ("vae",),
    "cond_stage_model.transformer.text_model.": ("text_encoder", "tokenizer"),
    "cond_stage_model.model.": ("text_encoder", "tokenizer"),
    "conditioner.embedders.0.transformer.text_model.": ("text_encoder", "tokenizer"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "tokenizer_2"),  # alone, in a refiner
    "conditioner.embedders.1.model.": ("text_encoder_2", "tokenizer_2"),
}
# Files that are no Stable Diffusion model, by a pattern that some name in them matches; the first that fits counts.
_OTHERS = (
    ("trained weights of Custom Diffusion, which belong to --weights", r"_custom_diffusion\.|\.attn2\.to_[kv]\.weight\.up$"),
    ("a LoRA", r"lora[_.](up|down|[AB])\b|\.(lokr|hada)_w|dora_scale"),
    ("an IP-Adapter", r"^(ip_adapter|image_proj)\."),
    ("a ControlNet", r"^control_model\.|^input_hint_block\.|^controlnet_|^control_.*x_embedder"),
    ("an AnimateDiff motion module", r"motion_modules\."),
    ("a Flux model", r"(^|\.)(double_blocks\.\d+\.img_attn|single_stream_modulation|single_transformer_blocks)\."),
    ("a Stable Diffusion 3 model", r"(^|\.)joint_blocks\.\d+\.context_block"),
    ("an AuraFlow model", r"(^|\.)double_layers\.\d+\.attn"),
    ("a PixArt or Sana model", r"(^|\.)blocks\.\d+\.cross_attn\.kv_linear\.|^adaln_single\."),
    ("a Stable Cascade model", r"^clip_txt_mapper\.|^down_blocks\.\d+\.\d+\.channelwise\."),
    ("a Playground v2.5 model, which learns by another noise schedule", r"^edm_mean$"),
    ("a textual-inversion embedding", r"^(emb_params|clip_[lg]|string_to_param.*|<[^<>]+>)$"),
)  # fmt: skip
# Parts of a model, where it has no UNet with its text encoder.
_ALONE = (
    ("a UNet without the text encoder that belongs to it", rf"^({re.escape(UNET_PREFIX)})?input_blocks\.|^down_blocks\.0\.resnets\."),
    ("a VAE alone", r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.conv_in\."),
    ("a text encoder alone", r"^(text_model|transformer|encoder\.block|cond_stage_model|conditioner|text_encoders)\."),
)  # fmt: skip
# A VAE's weights in the layout of such files, wherever they stand in one, and as diffusers names them.
_VAE, _DIFFUSERS_VAE = (
    re.compile(rf"^(first_stage_model\.|vae\.)?decoder\.{middle}\.") for middle in ("mid", "mid_block")
)
_CHANNELS = {5: "a depth-to-image", 7: "an upscaling", 8: "an InstructPix2Pix"}


@dataclass(frozen=True)
class SingleFile:
    """What the header of a `.safetensors` file says.

    Attributes:
        shapes, dtypes: of every tensor by name; dtypes as the format calls them, "F16".
        metadata: what whoever wrote the file put into it.
        digest: SHA-256 of the header, which names every tensor, its shape and its place, and holds trainers' hashes.
        size: of the whole file, in bytes.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    digest: str
    size: int

    @cached_property
    def parts(self) -> dict[str, str]:
        """Which parts of a pipeline it holds, as `model_index.json` would list them, and what their weights' names begin with."""
        found = {}
        for name in self.shapes:
            for prefix, parts in _PARTS.items():
                if name.startswith(prefix):
                    found |= dict.fromkeys(parts, prefix)
        return found

    @property
    def in_channels(self) -> int:
        """Of the UNet: those of the latents, and in an inpainting model those of the mask and the masked image."""
        return self.shapes[_CONV_IN][1]

    @property
    def prediction_type(self) -> str | None:
        """ "epsilon" or "v_prediction" where the file says so, as few do."""
        if "v_pred" in self.shapes:  # by a convention of trainers, like "ztsnr" an empty tensor
            return "v_prediction"
        said = self.metadata.get("modelspec.prediction_type") or self.metadata.get("modelspec.predict_key")
        return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said)

    @property
    def schedule(self) -> dict:
        """What it says of the schedule that it was trained with, by the names of a scheduler's configuration."""
        said = {} if self.prediction_type is None else {"prediction_type": self.prediction_type}
        return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in self.shapes else {})

    @property
    def may_predict_velocities(self) -> bool:
        """Whether models of its kind come in both: those with OpenCLIP as only text encoder (2.x)."""
        return self.parts.get("text_encoder") == "cond_stage_model.model."

    def identity(self) -> dict:
        """What tells this file from others, and its name, for the settings of what is trained on it."""
        return {"name": self.path.name, "size": self.size, "header_sha256": self.digest}

    def what_else(self) -> str | None:
        """What it is, with its article, if it is no whole model with a UNet of Stable Diffusion's; else None."""
        for what, pattern in _OTHERS:
            if any(re.search(pattern, name) for name in self.shapes):
                return what
        if not {"unet", "text_encoder", "tokenizer"} <= self.parts.keys() and "text_encoder_2" not in self.parts:
            for what, pattern in _ALONE:
                if any(re.search(pattern, name) for name in self.shapes):
                    return what
        if "unet" not in self.parts:
            return f"no model that is known here (its first tensor is '{min(self.shapes, default='')}')"
        if self.in_channels in _CHANNELS:
            return f"{_CHANNELS[self.in_channels]} model ({self.in_channels} input channels)"
        return None


def read_header(path: Path) -> SingleFile:
    """Read the header of a file; whatever is in it, no weight is read.

    Raises:
        OSError: the file cannot be read. ValueError: it is no safetensors file, or not a whole one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError("it does not begin as a safetensors file does")
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: entry["dtype"] for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("its header is no safetensors header") from None
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes where its header speaks of {8 + length + end:,}")
    return SingleFile(path, shapes, dtypes, metadata, hashlib.sha256(header).hexdigest(), size)


def is_single_file(model: str) -> bool:
    """Whether this names one file, there or not, rather than a folder or Hub id."""
    path = Path(model).expanduser()
    return path.is_file() or path.suffix.lower() in (SUFFIX, *PICKLES, ".gguf")


def model_in(path: str) -> SingleFile:
    """The header of a base model in one file.

    Raises:
        ValueError: it is none, as far as its header shows; the message, which goes after the file's name, says what it is instead,
            and what to do.
    """
    file = _opened(path)
    if what := file.what_else():
        raise ValueError(f"is {what}; {SUPPORTED}")
    parts = file.parts | {"_class_name": "single file"}
    if set(missing_parts(closest_family(parts), parts)) - {"vae"}:  # which another may stand for
        raise ValueError(f"is {what_it_is(parts)}; {SUPPORTED}")
    if others := {dtype for name, dtype in file.dtypes.items() if name.startswith(UNET_PREFIX)} - _TRAINABLE:
        raise ValueError(
            f"has weights in {', '.join(sorted(others))}, made smaller for drawing; give one in fp16 or fp32"
        )
    return file


def vae_in(path: str) -> SingleFile:
    """The header of a file that has a VAE, alone or in a whole model.

    Raises:
        ValueError: it has none; the message as of `model_in`.
    """
    file = _opened(path)
    if any(_VAE.match(name) for name in file.shapes):
        return file
    if any(_DIFFUSERS_VAE.match(name) for name in file.shapes):
        raise ValueError("is a VAE as diffusers names its weights; give the folder with it and its config.json")
    what = file.what_else() or "a model without one"
    raise ValueError(
        f"has no VAE of {STABLE_DIFFUSION.name}'s kind (it is {what}); give a VAE's file or folder, or a Hub id"
    )


def _opened(path):
    """The header of a file; ValueError, as of `model_in`, if it is not there or no safetensors file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            "is no file that is there; download it if it is on the web, and give its path, or a folder or Hub id"
        )
    if path.suffix.lower() in PICKLES:
        raise ValueError("is a pickle, which can run code when it is read, and so is not; convert it to .safetensors")
    if path.suffix.lower() != SUFFIX:
        raise ValueError("is a file, but no .safetensors; give one, or a folder in the diffusers layout, or a Hub id")
    try:
        return read_header(path)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"is damaged ({error}); download it again") from None
