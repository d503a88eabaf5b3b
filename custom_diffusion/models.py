"""The Stable Diffusion model that is taught: checked by its configuration files, then loaded, frozen, and put together."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.args import InputError
from custom_diffusion.attention import trained_tensors
from custom_diffusion.cuda_graphs import record_unet
from custom_diffusion.tokens import modifier_embeddings
from custom_diffusion.weights import ConceptWeights


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from: a folder or Hub id, and which version of it."""

    path: str
    revision: str | None = None
    variant: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class ModelShape:
    """What the configuration files say, as far as training needs it before the weights are there."""

    vae_factor: int
    latent_channels: int


def check_model(source: ModelSource) -> tuple[ModelShape, DDPMScheduler]:
    """Read the configuration files only.

    Raises:
        InputError: it is no Stable Diffusion 1.x or 2.x model in the diffusers layout.
    """
    where = f"--pretrained_model_name_or_path: '{source.path}'"
    try:
        index = DiffusionPipeline.load_config(source.path, revision=source.revision)
        read = {"subfolder": "unet", "revision": source.revision}
        unet = UNet2DConditionModel.load_config(source.path, **read)
        vae = AutoencoderKL.load_config(source.path, **read | {"subfolder": "vae"})
        text = AutoConfig.from_pretrained(source.path, **read | {"subfolder": "text_encoder"})
        scheduler = DDPMScheduler.from_pretrained(source.path, **read | {"subfolder": "scheduler"})
    except Exception as error:  # the loaders raise OSError, ValueError and the Hub's and JSON's own types
        raise InputError(
            f"{where} cannot be read as a diffusers model ({_first_line(error)}); "
            "give a folder with model_index.json or a Hub id"
        ) from None
    if "text_encoder_2" in index or "unet" not in index or "vae" not in index:
        raise InputError(f"{where} is a {index.get('_class_name')}; Stable Diffusion 1.x and 2.x models are supported")
    problems = _weight_file_problems(source)
    if unet["in_channels"] != vae["latent_channels"]:
        problems.append(f"{where} takes {unet['in_channels']} input channels; use a text-to-image model")
    if unet["cross_attention_dim"] != text.hidden_size:
        problems.append(f"{where}: its UNet expects text features of another width than its text encoder makes")
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        problems.append(f"{where}: prediction type {scheduler.config.prediction_type!r} is not supported")
    if problems:
        raise InputError(*problems)
    shape = ModelShape(vae_factor=2 ** (len(vae["block_out_channels"]) - 1), latent_channels=vae["latent_channels"])
    return shape, scheduler


def _weight_file_problems(source):
    """Missing and truncated weight files of a model in a folder. Reads their headers only."""
    problems, suffix = [], f".{source.variant}" if source.variant else ""
    for part in ("unet", "vae", "text_encoder"):
        folder = Path(source.path) / part
        if not folder.is_dir():
            continue
        files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") and Path(p.stem).suffix == suffix]
        if not files:
            named = f"with '{suffix}' in their name " if suffix else ""
            problems.append(
                f"--pretrained_model_name_or_path: '{folder}' has no weight files {named}(.safetensors, .bin)"
            )
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt"):
                        pass
            except Exception as error:  # OSError and the library's own type
                problems.append(
                    f"--pretrained_model_name_or_path: '{file}' is damaged ({_first_line(error)}); download it again"
                )
    return problems


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises InputError if there is none."""
    flag = "--tokenizer_name" if source.tokenizer else "--pretrained_model_name_or_path"
    path = source.tokenizer or source.path
    try:
        return AutoTokenizer.from_pretrained(
            path, subfolder="" if source.tokenizer else "tokenizer", revision=source.revision
        )
    except Exception as error:  # as above
        raise InputError(f"{flag}: '{path}' has no tokenizer that can be read ({_first_line(error)})") from None


def load_models(
    source: ModelSource, weight_dtype: torch.dtype, device: torch.device
) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL]:
    """Load the UNet, text encoder and VAE encoder onto `device`.

    The VAE and all of the UNet but its cross-attention come in `weight_dtype`; what training may start from (the
    cross-attention and the text encoder) stays float32 until `cast_frozen`.

    Raises:
        InputError: a weight file is missing or damaged.
    """
    read = {"revision": source.revision, "variant": source.variant, "device_map": straight_to(device)}
    try:
        # The decoder goes before the UNet comes, so that it never counts in the peak of memory.
        vae = encoder_only(load_vae(source, weight_dtype, device))
        text_encoder = read_text_encoder(source, device_map=straight_to(device))
        unet = _UNetWithFullCrossAttention.from_pretrained(
            source.path, subfolder="unet", torch_dtype=weight_dtype, **read
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--pretrained_model_name_or_path: cannot load the weights of '{source.path}' ({_first_line(error)})"
        ) from None
    return lay_out(unet), text_encoder, vae


def read_text_encoder(source: ModelSource, **options) -> CLIPTextModel:
    """In float32.

    Args:
        options: further ones for `from_pretrained`.
    Raises:
        ValueError: weights are missing. transformers would only warn, and leave them random.
        OSError and others: what transformers raises for files that cannot be read.
    """
    text_encoder, report = CLIPTextModel.from_pretrained(
        source.path,
        subfolder="text_encoder",
        revision=source.revision,
        variant=source.variant,
        output_loading_info=True,
        **options,
    )
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{len(missing)} weights of its text encoder are missing, {min(missing)} first; models saved by "
            "transformers 5.6 or newer may need it to be read: pip install --upgrade transformers"
        )
    return text_encoder.float()  # older versions call the argument for it `torch_dtype`, newer ones `dtype`


class _UNetWithFullCrossAttention(UNet2DConditionModel):
    _keep_in_fp32_modules = ["attn2"]  # noqa: RUF012 (diffusers reads it as a class attribute)


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


def load_vae(source: ModelSource, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """The whole VAE, frozen, on the device."""
    vae = AutoencoderKL.from_pretrained(
        source.path,
        subfolder="vae",
        torch_dtype=dtype,
        revision=source.revision,
        variant=source.variant,
        device_map=straight_to(device),
    )
    return lay_out(vae.requires_grad_(False))


def encoder_only(vae: AutoencoderKL) -> AutoencoderKL:
    """Drop the decoder's weights."""
    vae.decoder = vae.post_quant_conv = None
    return vae


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter that is not trained."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def enable_gradient_checkpointing(unet: UNet2DConditionModel) -> None:
    """As diffusers does it, but without keeping the state of the random numbers, which a recording must not ask for.

    Nothing in the UNet is random.
    """
    unet.enable_gradient_checkpointing(
        lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)
    )


class ConceptModel(nn.Module):
    """UNet and text encoder with their trained parts in one module, which is what accelerate prepares.

    Prompts without a modifier token have constant features: they are encoded once, one at a time, and kept.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase,
                 modifier_tokens: list[str]):  # fmt: skip
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.modifier_ids = set(tokenizer.convert_tokens_to_ids(modifier_tokens))
        self.constant_features = {}
        self._ids = {}
        self.recorded = None  # what predicts in place of the UNet while gradients are wanted

    def record(self, latents_shape: tuple[int, int, int, int]) -> None:
        """Record the UNet for training batches of this shape (B, C, h, w), and no others; needs a CUDA device."""
        length, width = self.tokenizer.model_max_length, self.unet.config.cross_attention_dim
        self.recorded = record_unet(
            self.unet, latents_shape, (latents_shape[0], length, width), features_need_grad=bool(self.modifier_ids)
        )

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def trained_tensors(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Copies on the CPU: the UNet's trained parameters by name, and the modifier tokens' rows (num_modifiers, dim)."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in trained_tensors(self.unet).items()}
        rows = modifier_embeddings(self.text_encoder)
        return tensors, torch.empty(0, 0) if rows is None else rows.detach().to("cpu", copy=True)

    @torch.no_grad()
    def load_trained(self, weights: ConceptWeights) -> None:
        """Copy weights that a run with the same flags has saved."""
        for name, parameter in trained_tensors(self.unet).items():
            parameter.copy_(weights.tensors[name])
        if weights.tokens:
            modifier_embeddings(self.text_encoder).copy_(torch.stack(list(weights.tokens.values())))

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Predict the noise (or velocity).

        Args:
            noisy_latents: (B, C, h, w). timesteps: (B,). prompts: B strings.
        Returns:
            (B, C, h, w) in the UNet's precision.
        """
        features = self.encode_prompts(prompts)
        noisy_latents = noisy_latents.to(features.dtype)
        if self.recorded is not None and torch.is_grad_enabled():
            return self.recorded(noisy_latents, timesteps, features)
        return self.unet(noisy_latents, timesteps, features, return_dict=False)[0]

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """(B, T, D) text features of B prompts of T tokens after padding."""
        learned = [index for index, prompt in enumerate(prompts) if self._tokenized(prompt)[1]]
        features = [None] * len(prompts)
        if learned:
            for index, row in zip(learned, self._encode([prompts[index] for index in learned])):
                features[index] = row
        for index, prompt in enumerate(prompts):
            if features[index] is None:
                if prompt not in self.constant_features:
                    with torch.no_grad():
                        self.constant_features[prompt] = self._encode([prompt])[0]
                features[index] = self.constant_features[prompt]
        return torch.stack(features)

    def _encode(self, prompts):
        return self.text_encoder(torch.stack([self._tokenized(prompt)[0] for prompt in prompts]))[0]

    def _tokenized(self, prompt):
        """(T,) token ids on the text encoder's device, and whether a modifier token is among them; kept by prompt."""
        if prompt not in self._ids:
            ids = self.tokenizer(
                prompt,
                truncation=True,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
            has_modifier = not self.modifier_ids.isdisjoint(ids.tolist())
            self._ids[prompt] = _to_device(ids, self.text_encoder.device), has_modifier
        return self._ids[prompt]


def _to_device(tensor, device):
    """Without waiting for what a GPU is doing, which a copy from ordinary memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
