"""Where a model lies, and what its configuration files say before any weights are read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from custom_diffusion.errors import InputError, first_line, warn
from custom_diffusion.families import SUPPORTED, Family, closest_family, family_of, what_it_is
from custom_diffusion.files import MODEL_INDEX
from custom_diffusion.model.inpainting import paints_holes
from custom_diffusion.model.original_layout import check_unet, check_vae, repository
from custom_diffusion.single_file import SingleFile, is_single_file, model_in, vae_in

UNET_FILE = "diffusion_pytorch_model"
VAE_FLAG = "--pretrained_vae_model_name_or_path"
CONFIG_FLAG = "--config_from"
PREDICTION_TYPES = ("epsilon", "v_prediction")
OTHER_NOISE = (
    "EDM",
    "FlowMatch",
)  # how the schedulers of models with continuous noise are called, such as Playground 2.5
NOT_DIFFUSERS = f"cannot be read as a diffusers model ({{reason}}); give a folder or Hub id with {MODEL_INDEX}"
OR_A_FILE = ", or a .safetensors file that you have downloaded"


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, Hub id or single file, and which version of it.

    Attributes:
        tokenizer: another (first) tokenizer's folder or Hub id.
        flag: which flag names the model, for messages.
        asked: the user named it now; if not, the weights do.
        vae: another VAE's folder, Hub id or single file.
        prediction_type: what the UNet predicts, if not what the model's scheduler says.
        config_from: folder or Hub id that has the configuration, tokenizers and schedule of a single file.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    tokenizer: str | None = None
    flag: str = "--model"
    asked: bool = True
    vae: str | None = None
    prediction_type: str | None = None
    config_from: str | None = None

    @cached_property
    def file(self) -> SingleFile | None:
        """The header of a single file, None for a folder or Hub id. Raises InputError if it is no model that is supported."""
        if not is_single_file(self.path):
            return None
        try:
            return model_in(self.path)
        except ValueError as error:
            raise InputError(f"{self.flag}: '{self.path}' {error}") from None

    @cached_property
    def vae_file(self) -> SingleFile | None:
        """The header of the single file that has the VAE's weights, if it is in one. Raises InputError if there is none in it."""
        if self.vae is None:
            return self.file
        if not is_single_file(self.vae):
            return None
        try:
            return vae_in(self.vae)
        except ValueError as error:
            raise InputError(f"{VAE_FLAG}: '{self.vae}' {error}") from None

    @property
    def described_by(self) -> "ModelSource":
        """Where the configuration, tokenizers and schedule are: the model itself, or for a single file another."""
        file = self.file
        if file is None:
            return self
        asked = self.asked or self.config_from is None
        return ModelSource(self.config_from or repository(file), flag=CONFIG_FLAG, asked=asked)

    @property
    def schedule(self) -> dict:
        """What stands for values of the scheduler's configuration."""
        said = {} if self.file is None else self.file.schedule
        return said if self.prediction_type is None else said | {"prediction_type": self.prediction_type}

    def recorded(self) -> dict:
        """What the settings of a trained folder say of its base model."""
        return {
            "base_model": wherever_called_from(self.path),
            "revision": self.revision,
            "variant": self.variant,
            "config_from": wherever_called_from(self.config_from),
            "base_file": None if self.file is None else self.file.identity(),
        }

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


def wherever_called_from(place: str | None) -> str | None:
    """The absolute path of a folder or file; a Hub id, or None, as it is."""
    return str(Path(place).expanduser().resolve()) if place and Path(place).expanduser().exists() else place


def base_of(
    config: dict, model: str | None, revision: str | None, variant: str | None, config_from: str | None = None
) -> ModelSource:
    """The model that `--model` names, or else the one that the weights' settings name.

    Either is drawn with as it was trained: with the VAE and the prediction type of the settings, where they name any. A single
    file that is not the one of the settings is told of.

    Raises:
        InputError: neither says which it is, or what the settings name is gone, or is another file now.
    """
    settings = config.get("settings", {})
    trained_as = {
        "vae": settings.get("pretrained_vae_model_name_or_path"),
        "prediction_type": settings.get("prediction_type"),
    }
    if model is not None:
        if is_single_file(model):
            trained_as["config_from"] = config_from or _config_of(config)
        source = ModelSource(model, revision, variant, **trained_as)
        _check_file(config, source)
        return source
    base = config.get("base_model")
    if not base:
        raise InputError("--model: the weights do not say which model they were trained on; give it")
    if Path(base).is_absolute() and not Path(base).exists():
        raise InputError(
            f"--model: the weights were trained on '{base}', which is not there; say where the model is now"
        )
    if is_single_file(base):
        trained_as["config_from"] = config_from or _config_of(config)
    source = ModelSource(base, config.get("revision"), config.get("variant"), asked=False, **trained_as)
    _check_file(config, source)
    return source


def _config_of(config):
    """What the weights' single file was described by, if it can be had."""
    described_by = config.get("config_from")
    if described_by and Path(described_by).is_absolute() and not Path(described_by).is_dir():
        warn(
            f"the configuration was taken from '{described_by}', which is not there; that of the file's family is used"
        )
        return None
    return described_by


def _check_file(config, source):
    """A single file must be the one that the weights were trained on, or the user must have named it."""
    recorded, file = config.get("base_file"), source.file
    if not recorded or file is None or file.identity() | {"name": None} == recorded | {"name": None}:
        return
    line = (
        f"'{source.path}' is not the file that the weights were trained on, '{recorded['name']}' of "
        f"{recorded['size']:,} bytes (SHA-256 of its header {recorded['header_sha256'][:12]}...)"
    )
    if not source.asked:
        raise InputError(f"--model: {line}; say where that one is now")
    warn(line)


@dataclass(frozen=True)
class ModelShape:
    """What the configuration files say, as far as training needs it before the weights are there.

    Attributes:
        configuration: a digest of them, which tells the model wherever it lies.
        pipeline_options: what a pipeline over modules in memory is made with.
        base_file: what tells a single file from others (`SingleFile.identity`), else None.
    """

    family: Family
    inpainting: bool
    vae_factor: int
    latent_channels: int
    configuration: str
    pipeline_options: dict
    base_file: dict | None

    @property
    def input_channels(self) -> int:
        """The UNet's: noisy latents, and for an inpainting model the mask and the latents of the image without its hole."""
        return 2 * self.latent_channels + 1 if self.inpainting else self.latent_channels


def read_index(source: ModelSource) -> tuple[Family, dict]:
    """The model's family, and what its `model_index.json` says.

    Raises:
        InputError: there is none, or it is of a model that is not supported.
    """
    config = source.described_by
    with config.reading(NOT_DIFFUSERS + OR_A_FILE if source.file is None else NOT_DIFFUSERS):
        index = DiffusionPipeline.load_config(config.path, revision=config.revision)
    family = family_of(index)
    if family is None:
        raise InputError(f"{config.flag}: '{config.path}' is {what_it_is(index)}; {SUPPORTED}")
    if source.file is not None and (own := closest_family(source.file.parts)) is not family:
        raise InputError(f"{config.flag}: '{config.path}' is a {family.name} model, '{source.path}' a {own.name} model")
    return family, index


def check_model(source: ModelSource) -> tuple[ModelShape, DDPMScheduler]:
    """Read the configuration files only.

    Raises:
        InputError: it is no model of the families that are supported, in the diffusers layout.
    """
    family, index = read_index(source)
    unet, own_vae = read_unet_config(source), read_vae_config(replace(source, vae=None))
    config = source.described_by
    place, read = config.path, {"revision": config.revision}
    with config.reading(NOT_DIFFUSERS):
        scheduler = DDPMScheduler.from_pretrained(place, subfolder="scheduler", **read, **source.schedule)
        widths = [
            AutoConfig.from_pretrained(place, subfolder=text.encoder, **read).hidden_size for text in family.texts
        ]
        # As the files have them: what a library adds to them differs from version to version.
        text_files = [
            PretrainedConfig.get_config_dict(place, subfolder=text.encoder, **read)[0] for text in family.texts
        ]
        scheduler_file = DDPMScheduler.load_config(place, subfolder="scheduler", **read)
    vae = read_vae_config(source)  # for a single file, that of the model's own
    where = f"{source.flag}: '{source.path}'"
    problems = (
        _weight_file_problems(source, family) if source.file is None else _single_file_problems(source, unet, own_vae)
    )
    if unet["in_channels"] != own_vae["latent_channels"] and not paints_holes(unet):
        problems.append(f"{where} takes {unet['in_channels']} input channels; use a text-to-image or inpainting model")
    if unet["cross_attention_dim"] != sum(widths):
        encoders = "text encoder makes" if len(widths) == 1 else "text encoders make"
        problems.append(f"{where}: its UNet expects text features of another width than its {encoders}")
    if unet.get("addition_embed_type") != family.addition_embed_type:
        problems.append(f"{where}: its UNet takes conditions that a {family.name} model's does not")
    if (kind := scheduler_file.get("_class_name", "")).startswith(OTHER_NOISE):
        problems.append(f"{where}: it was trained with another kind of noise than {family.name}, as its {kind} says")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        problems.append(f"{where}: prediction type {scheduler.config.prediction_type!r} is not supported")
    if (vae["latent_channels"], vae_factor(vae)) != (own_vae["latent_channels"], vae_factor(own_vae)):
        problems.append(f"{VAE_FLAG}: '{source.vae}' makes latents of another shape than the model's own VAE")
    if source.vae is not None and source.vae_file is not None:
        try:
            check_vae(source.vae_file, vae)
        except ValueError as error:
            problems.append(
                f"{VAE_FLAG}: '{source.vae}' is a VAE of another shape than the model's own ({error}); give one that fits, or a "
                "folder with its config.json"
            )
    if problems:
        raise InputError(*problems)
    shape = ModelShape(
        family=family,
        inpainting=paints_holes(unet),
        vae_factor=vae_factor(vae),
        latent_channels=vae["latent_channels"],
        configuration=_digest(unet, own_vae, *text_files, scheduler_file),
        pipeline_options={**family.pipeline_options, **{n: index[n] for n in family.options_of_model if n in index}},
        base_file=source.recorded()["base_file"],
    )
    return shape, scheduler


def check_num_inference_steps(source: ModelSource, num_inference_steps: int) -> None:
    """Raises InputError if the model's schedule has fewer steps, or if it has no configuration."""
    read_index(source)
    config = source.described_by
    with config.reading(NOT_DIFFUSERS):
        schedule = DDPMScheduler.from_pretrained(config.path, subfolder="scheduler", revision=config.revision)
    if num_inference_steps > (most := schedule.config.num_train_timesteps):
        raise InputError(f"--num_inference_steps: {num_inference_steps} is more than the model's {most}")


def read_unet_config(source: ModelSource) -> dict:
    """The configuration of the UNet. Raises InputError.

    A single file says itself what its UNet takes: inpainting models are often described by the text-to-image model.
    """
    config = source.described_by
    with config.reading(NOT_DIFFUSERS):
        unet = UNet2DConditionModel.load_config(config.path, subfolder="unet", revision=config.revision)
    return dict(unet) if source.file is None else dict(unet) | {"in_channels": source.file.in_channels}


def read_vae_config(source: ModelSource, **options) -> dict:
    """The configuration of the VAE, the model's own or the one that stands for it. Raises InputError.

    A single file has none: it is taken for a repaired or further trained copy of the model's own.
    """
    if source.vae is None or source.vae_file is not None:
        config = source.described_by
        with config.reading(NOT_DIFFUSERS):
            return AutoencoderKL.load_config(config.path, subfolder="vae", revision=config.revision, **options)
    says = "cannot be read as a VAE ({reason}); give a folder or Hub id with its config.json at the top"
    with ModelSource(source.vae, flag=VAE_FLAG, asked=source.asked).reading(says + OR_A_FILE):
        return AutoencoderKL.load_config(source.vae)


def vae_factor(vae: dict) -> int:
    """How many pixels a latent cell is wide, by the VAE's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _digest(*configurations):
    """Of what the configurations say of the model, not of where it lay or which version of a library wrote them."""
    said = [{k: v for k, v in c.items() if not (k.startswith("_") or k.endswith("_version"))} for c in configurations]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _single_file_problems(source, unet, own_vae):
    """A file that does not fit its configuration, or that says too little. Reads its header only."""
    problems, file = [], source.file
    try:
        check_unet(file, unet)
        if "vae" in file.parts:
            check_vae(file, own_vae)
    except ValueError as error:
        problems.append(
            f"{CONFIG_FLAG}: '{source.described_by.path}' describes another model than '{source.path}' ({error})"
        )
    if "vae" not in file.parts and source.vae is None:
        problems.append(f"{VAE_FLAG}: '{source.path}' has no VAE; name one that belongs to it")
    if file.may_predict_velocities and "prediction_type" not in source.schedule and source.config_from is None:
        problems.append(
            f"--prediction_type: '{source.path}' does not say what it predicts; give v_prediction (2.x models for 768 pixels) "
            "or epsilon (2.x models for 512 pixels)"
        )
    return problems


def _weight_file_problems(source, family):
    """Missing and truncated weight files of a model in a folder. Reads their headers only."""
    problems, suffix = [], f".{source.variant}" if source.variant else ""
    for part in ("unet", "vae", *(text.encoder for text in family.texts)):
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
