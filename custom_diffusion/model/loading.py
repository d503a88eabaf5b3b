"""Every way in which a base model is loaded: its parts for training, single tensors for the tools, or all as a pipeline."""

import warnings
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.files import MODEL_INDEX
from custom_diffusion.model.source import ModelSource, unet_files
from custom_diffusion.weights.format import ConceptWeights

# What `ModelSource.reading` says.
NOT_A_MODEL = f"cannot be read as a Stable Diffusion model ({{reason}}); give a folder with {MODEL_INDEX} or a Hub id"
NO_WEIGHTS = "has weights that cannot be loaded ({reason})"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises InputError if there is none."""
    path, subfolder, flag = source.path, "tokenizer", source.flag
    if source.tokenizer:
        path, subfolder, flag = source.tokenizer, "", "--tokenizer_name"
    try:
        return AutoTokenizer.from_pretrained(path, subfolder=subfolder, revision=source.revision)
    except Exception as error:  # as in `ModelSource.reading`
        raise InputError(f"{flag}: '{path}' has no tokenizer that can be read ({first_line(error)})") from None


def load_models(
    source: ModelSource, dtype: torch.dtype, device: torch.device
) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL]:
    """UNet, text encoder and VAE encoder, as training starts from them; see below for their precision.

    Raises:
        InputError: a weight file is missing or damaged.
    """
    # The decoder goes before the UNet comes, so that it never counts in the peak of memory.
    vae = encoder_only(load_vae(source, dtype, device))
    text_encoder = load_text_encoder(source, device)
    return load_unet(source, dtype, device), text_encoder, vae


def load_text_encoder(source: ModelSource, device: torch.device) -> CLIPTextModel:
    """In float32, for inference. Raises InputError if it cannot be loaded."""
    with source.reading(NO_WEIGHTS):
        text_encoder = CLIPTextModel.from_pretrained(
            source.path,
            subfolder="text_encoder",
            revision=source.revision,
            variant=source.variant,
            device_map=straight_to(device),
        )
    return text_encoder.float().eval()


def load_unet(source: ModelSource, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """In `dtype`, but for the cross-attention, which training may start from and which stays float32."""
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


class _UNetWithFullCrossAttention(UNet2DConditionModel):
    _keep_in_fp32_modules = ["attn2"]  # noqa: RUF012 (diffusers reads it as a class attribute)


def load_vae(source: ModelSource, dtype: torch.dtype, device: torch.device, *, again: bool = False) -> AutoencoderKL:
    """The whole VAE, frozen, on the device. `again` takes what was downloaded before, and does not ask the Hub."""
    with source.reading(NO_WEIGHTS):
        vae = AutoencoderKL.from_pretrained(
            source.path,
            subfolder="vae",
            torch_dtype=dtype,
            revision=source.revision,
            variant=source.variant,
            local_files_only=again,
            device_map=straight_to(device),
        )
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


def lay_out(module: nn.Module) -> nn.Module:
    """Convolutions of an accelerator are faster channels-last.

    On a CPU nothing is gained by that, and the weights can stay in the mapped file without a copy.
    """
    return module if module.device.type == "cpu" else module.to(memory_format=torch.channels_last)


def load_pipeline(source: ModelSource, dtype: torch.dtype, **parts) -> DiffusionPipeline:
    """The model as a pipeline, on the CPU; `parts` (safety_checker=None...) as diffusers takes them.

    Raises:
        InputError: it cannot be loaded.
    """
    with source.reading(NOT_A_MODEL), warnings.catch_warnings():
        # `dtype`, which newer versions of diffusers ask for instead, is unknown to the older ones.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return DiffusionPipeline.from_pretrained(
            source.path, torch_dtype=dtype, revision=source.revision, variant=source.variant, **parts
        )


def empty_unet(source: ModelSource) -> UNet2DConditionModel:
    """The UNet's modules and shapes without its weights. Raises InputError if it has no configuration."""
    with source.reading(NOT_A_MODEL), torch.device("meta"):
        config = UNet2DConditionModel.load_config(source.path, subfolder="unet", revision=source.revision)
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


def base_tensors(source: ModelSource, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The base UNet's parameters of these names, float32. Nothing else of the weight file is read.

    Raises:
        InputError: the file cannot be read, or lacks a name.
    """
    with source.reading(NOT_A_MODEL):
        tensors = {}
        for path, wanted in unet_files(source, list(names)).items():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name).float() for name in wanted}
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors |= {name: state[name].float() for name in wanted}
        return tensors
