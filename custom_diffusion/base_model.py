"""The base model of trained weights, as far as a tool needs it: its UNet's own projections, its text encoder, or all."""

import argparse
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.args import InputError
from custom_diffusion.models import ModelSource, read_text_encoder
from custom_diffusion.weights import ConceptWeights, read_weights

UNET_FILE = "diffusion_pytorch_model"


def read_concept(flag: str, path_or_hub_id: str) -> ConceptWeights:
    """Raises InputError, naming the flag, where `read_weights` raises ValueError."""
    try:
        return read_weights(path_or_hub_id)
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None


def base_of(args: argparse.Namespace, config: dict) -> ModelSource:
    """`--model`, or the model that the weights' settings name.

    Raises:
        InputError: neither says which it is.
    """
    if args.model is not None:
        return ModelSource(args.model, args.revision, args.variant)
    if not config.get("base_model"):
        raise InputError("--model: the weights do not say which model they were trained on; give it")
    return ModelSource(config["base_model"], config.get("revision"), config.get("variant"))


def load_pipeline(source: ModelSource, dtype: torch.dtype) -> DiffusionPipeline:
    """Raises InputError if it cannot be loaded."""
    with _named(source), warnings.catch_warnings():
        # `dtype`, which newer versions of diffusers ask for instead, is unknown to the older ones.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return DiffusionPipeline.from_pretrained(
            source.path,
            torch_dtype=dtype,
            revision=source.revision,
            variant=source.variant,
            text_encoder=read_text_encoder(source).to(dtype),
        )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Raises InputError if it cannot be loaded."""
    with _named(source):
        return AutoTokenizer.from_pretrained(source.path, subfolder="tokenizer", revision=source.revision)


def load_text_encoder(source: ModelSource) -> CLIPTextModel:
    """In float32. Raises InputError if it cannot be loaded."""
    with _named(source):
        return read_text_encoder(source).eval()


def empty_unet(source: ModelSource) -> UNet2DConditionModel:
    """The UNet's modules and shapes without its weights. Raises InputError if it has no configuration."""
    with _named(source), torch.device("meta"):
        config = UNet2DConditionModel.load_config(source.path, subfolder="unet", revision=source.revision)
        return UNet2DConditionModel.from_config(config)


def base_tensors(source: ModelSource, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The base UNet's parameters of these names, float32. Nothing else of the weight file is read.

    Raises:
        InputError: the file cannot be read, or lacks a name.
    """
    with _named(source):
        tensors = {}
        for path, wanted in _files_with(source, list(names)).items():
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name).float() for name in wanted}
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors |= {name: state[name].float() for name in wanted}
        return tensors


def _files_with(source, names):
    """File -> names in it. Large models are split over several files, with an index that says what is where."""
    middle = f".{source.variant}" if source.variant else ""
    for suffix in ("safetensors", "bin"):
        single = _unet_file(source, f"{UNET_FILE}{middle}.{suffix}")
        if single is not None:
            return {single: names}
        index = _unet_file(source, f"{UNET_FILE}.{suffix}.index{middle}.json")
        if index is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {place: _unet_file(source, place) for place in {places[name] for name in names}}
            return {file: [n for n in names if places[n] == place] for place, file in files.items()}
    raise ValueError(f"no unet/{UNET_FILE}{middle}.safetensors or .bin")


def _unet_file(source, name):
    """The path of a file of the UNet's folder, fetched from the Hub if need be; None if there is none."""
    if Path(source.path).is_dir():
        path = Path(source.path) / "unet" / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.path, f"unet/{name}", revision=source.revision))
    except EntryNotFoundError:
        return None


class _named:
    """Turns whatever loading a model raises into an InputError that names the model."""

    def __init__(self, source):
        self.source = source

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        # The loaders raise OSError, ValueError, KeyError, RuntimeError and the Hub's, JSON's and safetensors' own types.
        if isinstance(error, Exception):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"--model: '{self.source.path}' cannot be read as a Stable Diffusion model ({reason}); "
                "give a folder with model_index.json or a Hub id"
            ) from None


def check_shapes(weights: ConceptWeights, unet: UNet2DConditionModel, source: ModelSource) -> None:
    """Raises InputError if the weights are not for this UNet."""
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    for name, shape in weights.shapes().items():
        if name not in shapes:
            raise InputError(f"--model: '{source.path}' has no {name}; were the weights trained on another model?")
        if shapes[name] != shape:
            raise InputError(
                f"--model: {name} of '{source.path}' is {tuple(shapes[name])}, of the weights {tuple(shape)}; "
                "were they trained on another model?"
            )
