"""The page that the Hub shows of a trained concept."""

import os
import shlex
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from custom_diffusion.cli.base_model import cannot_be_hub_id
from custom_diffusion.families import family_named
from custom_diffusion.files import CURVE_IMAGE, WEIGHTS_NAME
from custom_diffusion.single_file import is_single_file

# Flags whose values are places on the user's computer.
PATH_FLAGS = ("instance_data_dir", "class_data_dir", "concepts_list", "output_dir", "logging_dir", "tokenizer_name",
              "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "config_from",
              "resume_from_checkpoint")  # fmt: skip
MODEL_FLAGS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "config_from")


def is_local(model: str | None) -> bool:
    """Whether this base model is no Hub id but a place on this computer. Not knowing one counts as local."""
    return not model or Path(model).exists() or cannot_be_hub_id(model) or is_single_file(model)


def model_card(
    repo_id: str, config: dict, samples: list[tuple[str, str]], command: str | None = None, *, has_curve: bool = False
) -> ModelCard:
    """The page that the Hub shows.

    Args:
        config: `settings.weights_config`, or what another folder's settings file holds of it.
        samples: image path inside the repository, and the prompt it was drawn from.
        command: how it was trained, if known.
        has_curve: the repository has the image of its losses.
    """
    base_model = None if is_local(config.get("base_model")) else config["base_model"]
    prompts = [concept["instance_prompt"] for concept in config.get("concepts", [])]
    tokens = config.get("modifier_tokens", [])
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="image-to-image" if config.get("inpainting") else "text-to-image",
        inference=True,
        tags=[
            "custom-diffusion",
            "diffusers",
            "diffusers-training",
            *family_named(config.get("family")).tags,
            "text-to-image",
        ],
        **_license(config.get("base_model"), config.get("revision")),
    )
    if prompts:
        data.instance_prompt = prompts[0] if len(prompts) == 1 else prompts
    if samples:
        data.widget = [{"text": prompt, "output": {"url": path}} for path, prompt in samples]
    # Backquotes: Markdown would take <new1> for a tag of HTML.
    images = "\n\n".join(f"![]({path})\n\n`{prompt}`" for path, prompt in samples)
    parts = [
        f"# Custom Diffusion: {repo_id.split('/')[-1]}",
        f"{_method(config)} for {_base(base_model, config.get('base_file'))}, taught by [Custom Diffusion](https://arxiv.org/abs/2212.04488).",
        _concept_table(prompts, tokens),
        images and f"## Samples\n\n{images}",
        "## Drawing with it\n\n" + _loading_code(repo_id, config | {"base_model": base_model or "BASE_MODEL"}, samples),
        "## Training\n\n" + _training(config, command, has_curve),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n")


def _method(config):
    if config.get("freeze_model") == "crossattn":
        return "The cross-attention (queries, keys, values, outputs) and new words"
    return "The cross-attention keys and values and new words"


def _base(base_model, base_file):
    if base_model:
        return f"[{base_model}](https://huggingface.co/{base_model})"
    if base_file:
        digest = f"SHA-256 of its header {base_file['header_sha256']}"
        return f"the single file `{base_file['name']}` ({base_file['size']:,} bytes, {digest})"
    return "a model of its author's own"


def _concept_table(prompts, tokens):
    if not prompts:
        return "New words: " + ", ".join(f"`{token}`" for token in tokens) if tokens else ""
    rows = [
        f"| `{prompt}` | {', '.join(f'`{token}`' for token in tokens if token in prompt) or 'none'} |"
        for prompt in prompts
    ]
    return "\n".join(["| instance prompt | new words |", "|---|---|", *rows])


def _loading_code(repo_id, config, samples):
    prompts = [concept["instance_prompt"] for concept in config.get("concepts", [])]
    prompt = samples[0][1] if samples else (prompts or config.get("modifier_tokens") or ["a photo"])[0]
    pipeline_class, made = _pipeline(config)
    inpainting = config.get("inpainting", False)
    images = "image=load_image('IMAGE.png'), mask_image=load_image('MASK.png'), " if inpainting else ""
    ours = [
        "import torch",
        f"from diffusers import {pipeline_class}",
        *(["from diffusers.utils import load_image"] if inpainting else []),
        "from custom_diffusion import load_custom_diffusion",
        "",
        f"pipe = {pipeline_class}.{made}, torch_dtype=torch.float16).to('cuda')",
        f"load_custom_diffusion(pipe, {repo_id!r})",
        *(["# The mask is white where the image is to be painted"] if inpainting else []),
        f"image = pipe({prompt!r}, {images}num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]",
    ]
    if config.get("compressed"):
        return (
            _python(ours) + "\n\nThe weights are compressed: changes of the base model's, which only this loader reads."
        )
    family, tokens = family_named(config.get("family")), config.get("modifier_tokens", [])
    plain = [
        *(["from huggingface_hub import hf_hub_download", ""] if tokens and len(family.texts) > 1 else []),
        "# _pipeline: without it, diffusers 0.29 and later load nothing, and say nothing",
        f"pipe.unet.load_attn_procs({repo_id!r}, weight_name={WEIGHTS_NAME + '.bin'!r}, _pipeline=pipe)",
        *family.words_code(
            tokens,
            repo_id,
            ".bin",
            lambda file: f"torch.load(hf_hub_download({repo_id!r}, {file!r}), weights_only=True)",
        ),
    ]
    return f"{_python(ours)}\n\nWith diffusers alone, in place of `load_custom_diffusion`:\n\n{_python(plain)}"


def _pipeline(config):
    """The pipeline's class, and how it is made of the base model, up to the options that follow."""
    family = family_named(config.get("family"))
    version = "".join(f", {name}={config[name]!r}" for name in ("revision", "variant") if config.get(name))
    if config.get("base_file"):
        name = family.inpainting if config.get("inpainting") else family.text_to_image
        return name, f"from_single_file({config['base_file']['name']!r}"
    name = family.inpainting if config.get("inpainting") else "DiffusionPipeline"
    return name, f"from_pretrained({config.get('base_model')!r}{version}"


def _python(lines):
    return "\n".join(["```python", *lines, "```"])


def _training(config, command, has_curve):
    parts = []
    if command:
        parts.append(f"```bash\n{command}\n```")
    if config.get("steps"):
        resolution = config.get("settings", {}).get("resolution")
        at = f" on images of {resolution} x {resolution} pixels" if resolution else ""
        parts.append(f"{config['steps']} optimizer steps{at}.")
    if has_curve:
        parts.append(
            f"![Losses against steps]({CURVE_IMAGE})\n\nMean squared errors on a fixed set of noisy images: the photos "
            "(`concept_loss`), and class images that training does not show (`prior_loss_held_out`), if there are any."
        )
    if versions := config.get("versions"):
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n\n".join(parts) or "Not recorded."


def _license(base_model, revision):
    """The base model's license, as its own card states it; nothing if that cannot be read."""
    if base_model is None:
        return {}
    try:
        if Path(base_model).is_dir():
            data = ModelCard.load(Path(base_model) / "README.md").data
        else:
            data = ModelCard.load(HfApi().hf_hub_download(base_model, "README.md", revision=revision)).data
    except Exception:  # no card, no network, a card that is no YAML: whatever it is, the license is not known
        return {}
    names = ("license", "license_name", "license_link")
    return {name: value for name in names if (value := getattr(data, name, None)) is not None}


def training_command(argv: list[str]) -> str:
    """The command line that started this process, without the Hub token, and with no path of this computer in it."""
    kept, pending = [Path(argv[0]).name], None
    for argument in argv[1:]:
        if pending is not None:
            name, pending = pending, None
            kept += [] if name == "hub_token" else [_public_value(name, argument)]
            continue
        flag, has_value, value = argument.partition("=")
        name = _full_name(flag)
        if name != "hub_token":
            kept.append(f"{flag}={_public_value(name, value)}" if has_value else argument)
        if name and not has_value:
            pending = name
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return shlex.join(["python", *kept])
    launcher = ["accelerate", "launch"]
    if os.environ["ACCELERATE_MIXED_PRECISION"] != "no":
        launcher += ["--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"]]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        launcher += ["--num_processes", os.environ["WORLD_SIZE"]]
    return shlex.join([*launcher, *kept])


def _full_name(flag):
    """Which flag that must not be shown as it is this one stands for, or None. argparse takes abbreviations such as --hub_t."""
    if not flag.startswith("--"):
        return None
    return next((name for name in ("hub_token", *PATH_FLAGS) if flag[2:] and name.startswith(flag[2:])), None)


def _public_value(name, value):
    if name in MODEL_FLAGS and not is_local(value):
        return value
    return name.upper() if name in PATH_FLAGS else value
