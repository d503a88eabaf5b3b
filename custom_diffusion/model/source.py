"""Where a model lies, and what its configuration files say before any weights are read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.files import MODEL_INDEX

UNET_FILE = "diffusion_pytorch_model"


@dataclass(frozen=True)
class ModelSource:
    """A model's folder or Hub id, and which version of it.

    Attributes:
        tokenizer: another tokenizer's folder or Hub id.
        flag: which flag names the model, for messages.
        asked: the user named it now; if not, the weights do.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    tokenizer: str | None = None
    flag: str = "--model"
    asked: bool = True

    @contextmanager
    def reading(self, says: str) -> Iterator[None]:
        """Turns whatever loading a model raises into an InputError that names the model; `says` has {reason} in it."""
        try:
            yield
        except InputError:
            raise
        # The loaders raise OSError, ValueError, KeyError, RuntimeError and the Hub's, JSON's and safetensors' own types.
        except Exception as error:
            named = "" if self.asked else ", which the weights name,"
            raise InputError(f"{self.flag}: '{self.path}'{named} {says.format(reason=first_line(error))}") from None


def base_of(config: dict, model: str | None, revision: str | None, variant: str | None) -> ModelSource:
    """The model that `--model` names, or else the one that the weights' settings name.

    Raises:
        InputError: neither says which it is.
    """
    if model is not None:
        return ModelSource(model, revision, variant)
    base = config.get("base_model")
    if not base:
        raise InputError("--model: the weights do not say which model they were trained on; give it")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"--model: the weights were trained on '{base}', which is not there; say where the model is now"
        )
    return ModelSource(base, config.get("revision"), config.get("variant"), asked=False)


@dataclass(frozen=True)
class ModelShape:
    """What the configuration files say, as far as training needs it before the weights are there.

    Attributes:
        configuration: a digest of them, which tells the model wherever it lies.
    """

    vae_factor: int
    latent_channels: int
    configuration: str


def check_model(source: ModelSource) -> tuple[ModelShape, DDPMScheduler]:
    """Read the configuration files only.

    Raises:
        InputError: it is no Stable Diffusion 1.x or 2.x model in the diffusers layout.
    """
    with source.reading(
        f"cannot be read as a diffusers model ({{reason}}); give a folder with {MODEL_INDEX} or a Hub id"
    ):
        index = DiffusionPipeline.load_config(source.path, revision=source.revision)
        read = {"subfolder": "unet", "revision": source.revision}
        unet = UNet2DConditionModel.load_config(source.path, **read)
        vae = AutoencoderKL.load_config(source.path, **read | {"subfolder": "vae"})
        text = AutoConfig.from_pretrained(source.path, **read | {"subfolder": "text_encoder"})
        scheduler = DDPMScheduler.from_pretrained(source.path, **read | {"subfolder": "scheduler"})
        # As the files have them: what a library adds to them differs from version to version.
        text_file, _ = PretrainedConfig.get_config_dict(source.path, **read | {"subfolder": "text_encoder"})
        scheduler_file = DDPMScheduler.load_config(source.path, **read | {"subfolder": "scheduler"})
    where = f"{source.flag}: '{source.path}'"
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
    shape = ModelShape(
        vae_factor=2 ** (len(vae["block_out_channels"]) - 1),
        latent_channels=vae["latent_channels"],
        configuration=_digest(unet, vae, text_file, scheduler_file),
    )
    return shape, scheduler


def _digest(*configurations):
    """Of what the configurations say of the model, not of where it lay or which version of a library wrote them."""
    said = [{k: v for k, v in c.items() if not (k.startswith("_") or k.endswith("_version"))} for c in configurations]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
            problems.append(f"{source.flag}: '{folder}' has no weight files {named}(.safetensors, .bin)")
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt"):
                        pass
            except Exception as error:  # OSError and the library's own type
                problems.append(f"{source.flag}: '{file}' is damaged ({first_line(error)}); download it again")
    return problems


def unet_files(source: ModelSource, names: list[str]) -> dict[Path, list[str]]:
    """File -> parameters in it. Large models are split over several files, with an index that says what is where.

    Raises:
        FileNotFoundError: the model has no UNet weights.
    """
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
    raise FileNotFoundError(f"no unet/{UNET_FILE}{middle}.safetensors or .bin")


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
