"""What a training step holds in memory, counted on tensors that have shapes and no values: nothing is computed."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from custom_diffusion.errors import InputError
from custom_diffusion.families import Family
from custom_diffusion.model.attention import install_trained_projections
from custom_diffusion.model.concept_model import cast_frozen
from custom_diffusion.model.frozen import replace_frozen_layers
from custom_diffusion.model.loading import encoder_only, vae_dtype
from custom_diffusion.model.source import (
    NOT_DIFFUSERS,
    ModelSource,
    read_index,
    read_unet_config,
    read_vae_config,
    vae_factor,
)
from custom_diffusion.model.text_encoders import TextEncoders
from custom_diffusion.model.tokens import TokenEmbedding
from custom_diffusion.training.latents import LatentEncoder

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# bitsandbytes: two states of a byte a value, and a float32 scale for each block of them; float32 states for small tensors.
BLOCK_SIZE, SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class StepSettings:
    """What the memory of a step depends on, beside the model.

    Attributes:
        num_photos: of a batch, whose prompts have the new word in them. num_images: photos and class images.
        resolution: side of the images in pixels; None for the family's own.
        freeze_model, precision, use_8bit_adam: as the flags of training have them. checkpointing: of gradients.
    """

    num_photos: int
    num_images: int
    resolution: int | None
    freeze_model: str
    precision: str
    checkpointing: bool
    use_8bit_adam: bool


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step holds.

    Attributes:
        unet, text, vae: weights of the UNet, the text encoders and the VAE's encoder. `text` has what its backward pass keeps, too.
        optimizer: AdamW's state. gradients: of all that is trained.
        kept: tensors that the UNet's forward pass keeps for the backward pass. passes: the most that both hold, those included.
        encoding: the most that encoding the images into latents holds, before there are gradients.
    """

    unet: int
    text: int
    vae: int
    optimizer: int
    gradients: int
    kept: int
    passes: int
    encoding: int

    @property
    def total(self) -> int:
        """At its peak."""
        always = self.unet + self.text + self.vae + self.optimizer
        return always + max(self.gradients + self.passes, self.encoding)


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a computation holds beside its parameters.

    Attributes:
        kept: by the tensors that the forward pass keeps for the backward pass.
        peak: at most, those included.
    """

    kept: int
    peak: int


def count_step(source: ModelSource, settings: StepSettings) -> StepMemory:
    """Count a step of training on a model, of which only the configuration is read.

    The attention is counted as torch's fused kernels, which keep no score matrix.

    Raises:
        InputError: the configuration cannot be read, or the resolution does not fit the VAE.
    """
    family, _ = read_index(source)
    vae_config = read_vae_config(source)
    resolution, factor = settings.resolution or family.resolution, vae_factor(vae_config)
    if resolution % factor:
        raise InputError(f"--resolution: {resolution} is not a multiple of {factor}")
    dtype = DTYPES[settings.precision]
    with FakeTensorMode():
        unet = fake_unet(source, settings, dtype)
        text = fake_text_encoders(source, family, dtype)
        vae = encoder_only(AutoencoderKL.from_config(vae_config)).requires_grad_(False)
        cast_frozen(vae, vae_dtype(source, dtype))
        text_pass, unet_pass = count_training(unet, text, settings, resolution // factor)
        pixels = torch.empty(settings.num_images, 3, resolution, resolution)
        with torch.no_grad():
            encoding = count_passes(lambda: LatentEncoder(vae, None).moments(pixels)[0], [vae])
        trained = [p for p in (*unet.parameters(), *text.parameters()) if p.requires_grad]
        return StepMemory(
            unet=parameter_bytes(unet),
            text=parameter_bytes(text) + text_pass.kept,
            vae=parameter_bytes(vae),
            optimizer=sum(state_bytes(parameter, settings.use_8bit_adam) for parameter in trained),
            gradients=sum(parameter.nbytes for parameter in trained),
            kept=unet_pass.kept,
            passes=unet_pass.peak,
            encoding=encoding.peak,
        )


def fake_unet(source: ModelSource, settings: StepSettings, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet as training has it."""
    with source.reading(NOT_DIFFUSERS):
        unet = UNet2DConditionModel.from_config(read_unet_config(source)).train()
    install_trained_projections(unet, settings.freeze_model)
    replace_frozen_layers(unet)
    cast_frozen(unet, dtype)
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def fake_text_encoders(source: ModelSource, family: Family, dtype: torch.dtype) -> TextEncoders:
    """The text encoders with one new word each, and without tokenizers, whose files are not read."""
    encoders = []
    for part in family.texts:
        described = source.described_by
        with described.reading(NOT_DIFFUSERS):
            config = AutoConfig.from_pretrained(described.path, subfolder=part.encoder, revision=described.revision)
            encoder = getattr(transformers, part.class_name)(config).requires_grad_(False)
        rows = torch.empty(1, config.hidden_size)
        encoder.set_input_embeddings(TokenEmbedding(encoder.get_input_embeddings(), config.vocab_size, rows))
        cast_frozen(encoder, dtype)
        encoders.append(encoder)
    return TextEncoders(family, [], encoders)


def count_training(
    unet: UNet2DConditionModel, text: TextEncoders, settings: StepSettings, latent_size: int
) -> tuple[PassMemory, PassMemory]:
    """Of the text encoders, which read the photos' prompts, and of the UNet, which sees all images."""
    length = text.encoders[0].config.max_position_embeddings
    ids = [torch.empty(settings.num_photos, length, dtype=torch.int64) for _ in text.encoders]
    text_pass = count_passes(lambda: text.encode_ids(ids)[0], [text])
    num_images, width = settings.num_images, unet.config.cross_attention_dim
    latents = torch.empty(num_images, unet.config.in_channels, latent_size, latent_size, dtype=unet.dtype)
    timesteps = torch.empty(num_images, dtype=torch.int64)
    features = torch.empty(num_images, length, width, dtype=unet.dtype, requires_grad=True)
    pooled = text.encode_ids(ids)[1]
    if pooled is not None:
        pooled = torch.empty(num_images, pooled.shape[1], dtype=unet.dtype)
    added = text.family.added_conditions(pooled, torch.empty(num_images, 6))

    def predict():
        return unet(latents, timesteps, features, added_cond_kwargs=added, return_dict=False)[0]

    return text_pass, count_passes(predict, [unet])


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def state_bytes(parameter: nn.Parameter, use_8bit_adam: bool) -> int:
    """Of AdamW's two states."""
    if use_8bit_adam and parameter.numel() >= SMALLEST_8BIT:
        return 2 * (parameter.numel() + 4 * -(-parameter.numel() // BLOCK_SIZE))
    return 2 * parameter.nbytes


def count_passes(predict: Callable[[], torch.Tensor], modules: list[nn.Module]) -> PassMemory:
    """Memory of a forward and a backward pass, under `FakeTensorMode` without the time they take.

    Gradients of parameters are dropped as soon as they are there, and counted apart.

    Args:
        predict: the forward pass; without a gradient in what it returns there is no backward pass.
        modules: whose parameters are not counted.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters if p.requires_grad]
    own = {_key(parameter.untyped_storage()) for parameter in parameters}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if _key(storage) not in own:
            kept[_key(storage)] = storage
        return tensor

    with _LiveBytes(own) as live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = predict()
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        if prediction.requires_grad:
            prediction.float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return PassMemory(kept_bytes, live.peak)


def _drop_gradient(parameter):
    parameter.grad = None


def _key(storage):
    """The same for every tensor on the same memory."""
    return storage._cdata


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors made while it is on, each storage once, until they are freed.

    Args:
        known: keys of storages that are not counted.
    """

    def __init__(self, known: set):
        super().__init__()
        self.sizes = dict.fromkeys(known, 0)  # of those that are alive
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage):
        key = _key(storage)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key):
        self.now -= self.sizes.pop(key)
