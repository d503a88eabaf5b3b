"""Every way in which a base model is loaded: its parts for training, single tensors for the tools, or all as a pipeline."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from custom_diffusion.errors import InputError, first_line, warn
from custom_diffusion.families import STABLE_DIFFUSION, Family, TextPart
from custom_diffusion.files import MODEL_INDEX
from custom_diffusion.model.inpainting import paints_holes
from custom_diffusion.model.original_layout import text_encoder_tensors, unet_from, unet_tensors, vae_from
from custom_diffusion.model.source import (
    VAE_FLAG,
    ModelSource,
    read_index,
    read_unet_config,
    read_vae_config,
    unet_files,
)
from custom_diffusion.model.text_encoders import TextEncoders
from custom_diffusion.weights.format import ConceptWeights

# What `ModelSource.reading` says.
NOT_A_MODEL = f"cannot be read as a Stable Diffusion model ({{reason}}); give a folder with {MODEL_INDEX} or a Hub id"
NO_WEIGHTS = "has weights that cannot be loaded ({reason})"
FIRST_TEXT = STABLE_DIFFUSION.texts[0]  # of every family, so far
# Layers that are given one row for each image, and so a single one for a single image. All others are given one for each token or
# latent cell.
_ONE_ROW = {"text_projection", "time_embedding", "add_embedding", "time_emb_proj"}
_ALIGNMENT = 64  # bytes, of the memory that torch itself takes on a CPU


def load_tokenizers(source: ModelSource, family: Family) -> list[PreTrainedTokenizerBase]:
    """One for each text encoder. Raises InputError if one is missing."""
    return [load_tokenizer(source, part) for part in family.texts]


def load_tokenizer(source: ModelSource, part: TextPart = FIRST_TEXT) -> PreTrainedTokenizerBase:
    """Raises InputError if there is none. `source.tokenizer` stands for the first of several."""
    config = source.described_by
    path, subfolder, flag = config.path, part.tokenizer, config.flag
    if source.tokenizer and part.tokenizer == FIRST_TEXT.tokenizer:
        path, subfolder, flag = source.tokenizer, "", "--tokenizer_name"
    try:
        return AutoTokenizer.from_pretrained(path, subfolder=subfolder, revision=config.revision)
    except Exception as error:  # as in `ModelSource.reading`
        raise InputError(f"{flag}: '{path}' has no {part.tokenizer} that can be read ({first_line(error)})") from None


def load_models(
    source: ModelSource, dtype: torch.dtype, device: torch.device
) -> tuple[UNet2DConditionModel, TextEncoders, AutoencoderKL]:
    """UNet, text encoders and VAE encoder, as training starts from them; see below for their precision.

    Raises:
        InputError: a weight file is missing or damaged.
    """
    # The decoder goes before the UNet comes, so that it never counts in the peak of memory.
    vae = encoder_only(load_vae(source, vae_dtype(source, dtype), device))
    text = load_text(source, device)
    return load_unet(source, dtype, device), text, vae


def load_text(source: ModelSource, device: torch.device) -> TextEncoders:
    """All text encoders of the model with their tokenizers, in float32, for inference. Raises InputError."""
    family, _ = read_index(source)
    tokenizers = load_tokenizers(source, family)
    return TextEncoders(family, tokenizers, [load_text_encoder(source, device, part) for part in family.texts])


def load_text_encoder(source: ModelSource, device: torch.device, part: TextPart = FIRST_TEXT) -> PreTrainedModel:
    """In float32, for inference.

    Raises:
        InputError: it cannot be loaded, or lacks weights: transformers would only warn of that, and leave them random.
    """
    encoder_class, config = getattr(transformers, part.class_name), source.described_by
    place = {"subfolder": part.encoder, "revision": config.revision}
    with source.reading(NO_WEIGHTS):
        if source.file is None:
            options = place | {"variant": source.variant, "device_map": straight_to(device)}
        else:
            own = encoder_class.config_class.from_pretrained(config.path, **place)
            options = {"config": own, "state_dict": text_encoder_tensors(source.file, part.encoder, own)}
        text_encoder, report = encoder_class.from_pretrained(
            source.path if source.file is None else None, output_loading_info=True, **options
        )
        if missing := report["missing_keys"]:
            raise ValueError(
                f"{len(missing)} weights of its {part.encoder.replace('_', ' ')} are missing, {min(missing)} first; models "
                "saved by transformers 5.6 or newer may need it to be read: pip install --upgrade transformers"
            )
    # Not by an argument: older versions of transformers call it `torch_dtype`, newer ones `dtype`.
    return lay_out(text_encoder.float().to(device).eval())


def load_unet(source: ModelSource, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """In `dtype`, but for the cross-attention, which training may start from and which stays float32."""
    if source.file is not None:
        full = _UNetWithFullCrossAttention.keeps_full
        return lay_out(_unet_from_file(source, device, lambda name: torch.float32 if full(name) else dtype))
    with source.reading(NO_WEIGHTS):
        unet = _UNetWithFullCrossAttention.from_pretrained(
            source.path,
            subfolder="unet",
            torch_dtype=dtype,
            revision=source.revision,
            variant=source.variant,
            device_map=straight_to(device),
        )
    return lay_out(unet)


def _unet_from_file(source, device, dtype_of):
    config = read_unet_config(source)
    with source.reading(NO_WEIGHTS):
        return unet_from(source.file.path, config, device, dtype_of)


class _UNetWithFullCrossAttention(UNet2DConditionModel):
    _keep_in_fp32_modules = ["attn2"]  # noqa: RUF012 (diffusers reads it as a class attribute)

    @classmethod
    def keeps_full(cls, name: str) -> bool:
        """Whether a parameter of this name stays float32."""
        return not set(cls._keep_in_fp32_modules).isdisjoint(name.split("."))


def vae_dtype(source: ModelSource, dtype: torch.dtype) -> torch.dtype:
    """The precision in which the VAE encodes, where all else is in `dtype`: float32 unless half precision is safe for it."""
    family, _ = read_index(source)
    if not family.vae_overflows or not read_vae_config(source).get("force_upcast", True):
        return dtype
    return torch.float32


def load_vae(source: ModelSource, dtype: torch.dtype, device: torch.device, *, again: bool = False) -> AutoencoderKL:
    """The whole VAE, frozen, on the device. `again` takes what was downloaded before, and does not ask the Hub."""
    options = {"torch_dtype": dtype, "local_files_only": again, "device_map": straight_to(device)}
    named = source if source.vae is None else ModelSource(source.vae, flag=VAE_FLAG, asked=source.asked)
    if source.vae_file is not None:
        config = read_vae_config(source, local_files_only=again)
        with named.reading(NO_WEIGHTS):
            vae = vae_from(source.vae_file.path, config, device, dtype)
    else:
        if source.vae is None:
            options |= {"subfolder": "vae", "revision": source.revision, "variant": source.variant}
        with named.reading(NO_WEIGHTS):
            vae = AutoencoderKL.from_pretrained(named.path, **options)
    return lay_out(vae.requires_grad_(False))


def encoder_only(vae: AutoencoderKL) -> AutoencoderKL:
    """Drop the decoder's weights."""
    vae.decoder = vae.post_quant_conv = None
    return vae


def straight_to(device: torch.device) -> dict:
    """A `device_map` with which weights go to the device one by one, and the CPU never holds a whole model.

    A process of several on a CPU has the device "cpu:0", which nothing is ever found to be on.
    """
    return {"": torch.device("cpu") if device.type == "cpu" else device}


def image_layout(device: torch.device) -> torch.memory_format:
    """How images and latents are to lie in memory: channels last on a CPU, whose convolutions are faster so.

    On an H200 with bf16 a step took the UNet as long either way, and the VAE a fifth less as torch lays them out.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def lay_out(module: nn.Module) -> nn.Module:
    """Place the weights in memory alike wherever they were read from, as an accelerator does by itself.

    On a CPU they can stay in the mapped file without a copy, but for matrices that meet a single row: such a product is summed in
    an order that depends on where the matrix begins in memory. In a file it begins anywhere, and the same weights would train to
    other bits from another.
    """
    if module.device.type != "cpu":
        return module
    for name, parameter in module.named_parameters():
        if not _ONE_ROW.isdisjoint(name.split(".")) and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return module


def load_pipeline(source: ModelSource, dtype: torch.dtype, *, safety_checker: bool = True) -> DiffusionPipeline:
    """The model as a pipeline, on the CPU, with the VAE and the prediction type that `source` names.

    An inpainting model becomes an inpainting pipeline. A single file brings no safety checker.

    Args:
        safety_checker: False leaves out the one that the model may bring.
    Raises:
        InputError: it cannot be loaded.
    """
    family, _ = read_index(source)
    cpu = torch.device("cpu")
    inpainting = paints_holes(read_unet_config(source))
    parts = {part.encoder: load_text_encoder(source, cpu, part).to(dtype) for part in family.texts}
    if source.vae is not None and Path(source.vae).is_absolute() and not Path(source.vae).exists():
        warn(f"the weights were trained with the VAE '{source.vae}', which is not there; the model's own is used")
        source = replace(source, vae=None)
    if source.vae is not None or source.file is not None:
        parts["vae"] = load_vae(source, dtype, cpu)
    if source.file is not None:
        parts["unet"] = _unet_from_file(source, cpu, lambda _: dtype)
    if not safety_checker and "safety_checker" in family.pipeline_options:
        parts["safety_checker"] = None
    with source.reading(NOT_A_MODEL), warnings.catch_warnings():
        # `dtype`, which newer versions of diffusers ask for instead, is unknown to the older ones.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        if source.file is not None:
            pipeline_class = getattr(diffusers, family.inpainting if inpainting else family.text_to_image)
            pipe = pipeline_class.from_single_file(str(source.file.path), config=source.described_by.path, **parts)
        else:
            pipeline_class = getattr(diffusers, family.inpainting) if inpainting else DiffusionPipeline
            pipe = pipeline_class.from_pretrained(
                source.path, torch_dtype=dtype, revision=source.revision, variant=source.variant, **parts
            )
        if source.schedule:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **source.schedule)
    return pipe


def empty_unet(source: ModelSource) -> UNet2DConditionModel:
    """The UNet's modules and shapes without its weights. Raises InputError if it has no configuration."""
    config = read_unet_config(source)
    with source.reading(NOT_A_MODEL), torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def empty_unet_for(weights: ConceptWeights, source: ModelSource) -> UNet2DConditionModel:
    """`empty_unet`, after it was found to be one that the weights fit; else InputError."""
    unet = empty_unet(source)
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    for name, shape in weights.shapes().items():
        if name not in shapes:
            raise InputError(
                f"{source.flag}: '{source.path}' has no {name}; were the weights trained on another model?"
            )
        if shapes[name] != shape:
            raise InputError(
                f"{source.flag}: {name} of '{source.path}' is {tuple(shapes[name])}, of the weights {tuple(shape)}; "
                "were they trained on another model?"
            )
    return unet


class FloatTensors(Mapping[str, torch.Tensor]):
    """Tensors that lie in a mapped file, by name. Each is made float32 when it is asked for, and not kept.

    All keys and values together may be 1.36 GB, and whoever compares two models needs one matrix at a time.
    """

    def __init__(self, stored: dict[str, torch.Tensor]):
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def base_tensors(source: ModelSource, names: Iterable[str]) -> FloatTensors:
    """The base UNet's parameters of these names. Nothing else of the weight file is read.

    Raises:
        InputError: the file cannot be read, or lacks a name.
    """
    if source.file is not None:
        config = read_unet_config(source)
        with source.reading(NOT_A_MODEL):
            own = unet_tensors(source.file.path, config)
            return FloatTensors({name: own[name] for name in names})
    with source.reading(NOT_A_MODEL):
        tensors = {}
        for path, wanted in unet_files(source, list(names)).items():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in wanted}
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors |= {name: state[name] for name in wanted}
        return FloatTensors(tensors)
