"""The weights of a model in one file, which has the original layout's names, as the modules that they belong to.

The file is mapped into memory, so that a weight is read when it is used, and none is held twice. A file of its own: what is
known here of that layout is diffusers' own conversion, and nothing else needs it.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    fetch_diffusers_config,
)
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig

from custom_diffusion.single_file import UNET_PREFIX, SingleFile


def repository(file: SingleFile) -> str:
    """The Hub repository whose configuration, tokenizers and schedule fit the file. Source: diffusers' own list."""
    return fetch_diffusers_config(_empty(file))["pretrained_model_name_or_path"]


def check_unet(file: SingleFile, config: dict) -> None:
    """Raises ValueError unless the file has the UNet that the configuration describes. No weight is read."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    # Of the UNet alone: diffusers would speak of flags that are not ours if it saw averaged weights beside them.
    own = {name: tensor for name, tensor in _empty(file).items() if name.startswith(UNET_PREFIX)}
    _wanted(unet, convert_ldm_unet_checkpoint(own, config))


def check_vae(file: SingleFile, config: dict) -> None:
    """Raises ValueError unless the file has the VAE that the configuration describes. No weight is read."""
    with init_empty_weights():
        vae = AutoencoderKL.from_config(config)
    _wanted(vae, convert_ldm_vae_checkpoint(_empty(file), config))


def _empty(file):
    return {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}


def unet_tensors(path: Path, config: dict) -> dict[str, torch.Tensor]:
    """The UNet's parameters as the file has them, by diffusers' names; each is read when it is used.

    Args:
        config: the UNet's configuration.
    """
    own = {name: tensor for name, tensor in load_file(path).items() if name.startswith(UNET_PREFIX)}
    return convert_ldm_unet_checkpoint(own, config)


def unet_from(
    path: Path, config: dict, device: torch.device, dtype_of: Callable[[str], torch.dtype]
) -> UNet2DConditionModel:
    """The UNet, each parameter in the precision that `dtype_of` its name gives.

    Raises:
        ValueError: the file lacks a parameter, or has it in another shape.
    """
    return _filled(UNet2DConditionModel, config, unet_tensors(path, config), device, dtype_of)


def vae_from(path: Path, config: dict, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, of a file that has it alone or in a whole model; arguments and errors as of `unet_from`."""
    tensors = convert_ldm_vae_checkpoint(load_file(path), config)
    return _filled(AutoencoderKL, config, tensors, device, lambda _: dtype)


def _filled(model_class: type[ModelMixin], config, tensors, device, dtype_of):
    with init_empty_weights():
        module = model_class.from_config(config)
    wanted = _wanted(module, tensors)
    module.load_state_dict({name: t.to(device, dtype_of(name)) for name, t in wanted.items()}, assign=True)
    return module.eval()


def _wanted(module: nn.Module, tensors: dict) -> dict[str, torch.Tensor]:
    """Those of the tensors that are the module's parameters; ValueError if any is missing or of another shape."""
    shapes, kind = {name: tensor.shape for name, tensor in module.state_dict().items()}, type(module).__name__
    if missing := [name for name in shapes if tensors.get(name) is None]:
        raise ValueError(f"{len(missing)} weights of its {kind} are missing, {min(missing)} first")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} of its {kind} is {tuple(tensors[name].shape)}, in the configuration {tuple(shape)}"
            )
    return {name: tensors[name] for name in shapes}


def text_encoder_tensors(file: SingleFile, part: str, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """A text encoder's parameters as the file has them, by transformers' names.

    Args:
        part: "text_encoder" or another of `file.parts`. config: the text encoder's.
    """
    prefix = file.parts[part]
    own = {name: tensor for name, tensor in load_file(file.path).items() if name.startswith(prefix)}
    if prefix.endswith("text_model."):
        return {
            f"text_model.{name.removeprefix(prefix)}": tensor
            for name, tensor in own.items()
            if not name.endswith("position_ids")  # a buffer that older programs save
        }
    return convert_open_clip_checkpoint(SimpleNamespace(config=config), own, prefix=prefix)
