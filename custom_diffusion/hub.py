"""Sharing on the Hub: the repository, the model card, the upload. Also a command, to upload any trained folder."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
import glob
import os
import shlex
import sys
from pathlib import Path

from custom_diffusion.args import InputError
from custom_diffusion.command import WEIGHTS_FILES, make_parser, parse, run, warn, weights_problems

EXAMPLE = """

  python -m custom_diffusion.hub logs/cat --hub_model_id user/cat

Writes a model card, README.md, into the folder if it has none yet, and uploads the weights, tokens, settings, samples and card.
"""
CONFIG_FILE = "custom_diffusion_config.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("hub", "Upload a trained folder to the Hub." + EXAMPLE)
    parser.add_argument("weights", help="trained folder")
    parser.add_argument("--hub_model_id", help="Hub repository (default: the folder's name, in your own namespace)")
    parser.add_argument("--hub_token", help="Hub token, if not logged in")
    return parse(parser, argv, _problems)


def _problems(args):
    problems = weights_problems("weights", args.weights)
    if not problems and not Path(args.weights).is_dir():
        problems = [f"weights: folder '{args.weights}' does not exist; give a trained folder"]
    return problems


if __name__ == "__main__":
    args = parse_args()

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


def create_repository(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """Make the repository of `--push_to_hub`, or find that it is there and can be written to.

    Returns:
        Its id, "user/name", in every process.
    Raises:
        InputError: not logged in, no right to write, a wrong name, or the Hub cannot be reached.
    """
    made = [None, None]  # id, problem
    if accelerator.is_main_process:
        try:
            made[0] = make_repository(args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_token)
        except InputError as error:
            made[1] = str(error)
    broadcast_object_list(made)
    repo_id, problem = made
    if problem:
        raise InputError(problem)
    return repo_id


def make_repository(name: str, token: str | None) -> str:
    """The full id of the repository `name`, which exists afterwards and can be written to; else InputError."""
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        try:
            api.auth_check(repo_id, write=True)  # an existing repository may be somebody else's
        except TypeError:
            pass  # older clients cannot ask
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise
    except HFValidationError as error:
        raise InputError(f"--hub_model_id: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        if _status(error) == 401:
            reason = "the Hub does not accept the login; run `hf auth login` with a token that may write"
        elif _status(error) == 403:
            reason = (
                f"no right to write to '{name}'; log in with a token that may write, or name another --hub_model_id"
            )
        else:
            reason = f"the Hub refuses to make '{name}' ({_first_line(error)})"
        raise InputError(f"--push_to_hub: {reason}") from None
    except Exception as error:  # the client lets through what its HTTP library raises, which changed between versions
        raise InputError(
            f"--push_to_hub: cannot reach the Hub at {api.endpoint} ({_first_line(error)}); "
            "check the network, or leave the flag out and upload later with `python -m custom_diffusion.hub`"
        ) from None
    return repo_id


def _status(error):
    return None if error.response is None else error.response.status_code


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def share(args: argparse.Namespace, output_dir: Path, repo_id: str, config: dict, pictures: list[Path]) -> bool:
    """Write the model card into `output_dir` and upload what a user needs. Called by the main process.

    A failure is told in one line, with the command that tries again; nothing on disk depends on it.

    Args:
        config: `settings.weights_config`.
        pictures: drawn from `args.validation_prompt`, below `output_dir`.
    Returns:
        Whether it is uploaded.
    """
    samples = [(path.relative_to(output_dir).as_posix(), args.validation_prompt) for path in pictures]
    card = model_card(repo_id, config, samples, training_command(sys.argv))
    write_card(output_dir, card)
    return upload(output_dir, repo_id, config, args.hub_token)


def upload(folder: Path, repo_id: str, config: dict, token: str | None) -> bool:
    """Upload weights, tokens, settings, samples and card; not checkpoints or logs. Returns as `share`."""
    try:
        url = HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[
                *WEIGHTS_FILES,
                CONFIG_FILE,
                "README.md",
                "samples/*.png",
                *(f"{glob.escape(token)}.{s}" for token in config.get("modifier_tokens", []) for s in ("safetensors", "bin")),
            ],
            commit_message="Upload Custom Diffusion weights",
        )  # fmt: skip
    except Exception as error:  # as above, and whatever it is, the run was good and its files are there
        again = ["python", "-m", "custom_diffusion.hub", str(folder), "--hub_model_id", repo_id]
        warn(
            f"the upload to '{repo_id}' failed ({_first_line(error)}). Everything is in '{folder}'. "
            f"To upload it later: {shlex.join(again)}"
        )
        return False
    print(f"Uploaded to {url}")
    return True


def training_command(argv: list[str]) -> str:
    """The command line that started this process, without the Hub token."""
    kept, skip = [], False
    for argument in argv:
        # argparse takes abbreviations such as --hub_t too.
        secret = argument.startswith("--hub_t")
        if not skip and not secret:
            kept.append(argument)
        skip = secret and "=" not in argument
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return shlex.join(["python", *kept])
    launcher = ["accelerate", "launch"]
    if os.environ["ACCELERATE_MIXED_PRECISION"] != "no":
        launcher += ["--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"]]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        launcher += ["--num_processes", os.environ["WORLD_SIZE"]]
    return shlex.join([*launcher, *kept])


def write_card(folder: Path, card: ModelCard) -> None:
    """Write README.md. A local folder as base model is left out of its metadata if the Hub does not take it."""
    from custom_diffusion.weights import whole_file

    try:
        card.validate()
    except ValueError:  # other faults than this one are for the upload to tell
        if Path(card.data.base_model or "").is_dir():
            warn("the Hub takes no local folder as base_model: it is left out of the card's metadata")
            card.data.base_model = None
    except Exception:  # it cannot be asked now; the upload will
        pass
    with whole_file(folder / "README.md") as path:
        card.save(path)


def model_card(repo_id: str, config: dict, samples: list[tuple[str, str]], command: str | None = None) -> ModelCard:
    """The page that the Hub shows.

    Args:
        config: `settings.weights_config`, or what another folder's settings file holds of it.
        samples: picture path inside the repository, and the prompt it was drawn from.
        command: how it was trained, if known.
    """
    base_model = config.get("base_model")
    prompts = [concept["instance_prompt"] for concept in config.get("concepts", [])]
    tokens = config.get("modifier_tokens", [])
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        tags=["custom-diffusion", "diffusers", "diffusers-training", "stable-diffusion", "text-to-image"],
        **_license(base_model, config.get("revision")),
    )
    if prompts:
        data.instance_prompt = prompts[0] if len(prompts) == 1 else prompts
    if samples:
        data.widget = [{"text": prompt, "output": {"url": path}} for path, prompt in samples]
    # Backquotes: Markdown would take <new1> for a tag of HTML.
    pictures = "\n\n".join(f"![]({path})\n\n`{prompt}`" for path, prompt in samples)
    where = (
        f"`{base_model}`"
        if base_model is None or Path(base_model).is_dir()
        else f"[{base_model}](https://huggingface.co/{base_model})"
    )
    parts = [
        f"# Custom Diffusion: {repo_id.split('/')[-1]}",
        f"{_method(config)} for {where}, taught by [Custom Diffusion](https://arxiv.org/abs/2212.04488).",
        _concept_table(prompts, tokens),
        pictures and f"## Samples\n\n{pictures}",
        "## Drawing with it\n\n" + _loading_code(repo_id, config, samples),
        "## Training\n\n" + _training(config, command),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n")


def _method(config):
    if config.get("freeze_model") == "crossattn":
        return "The cross-attention (queries, keys, values, outputs) and new words"
    return "The cross-attention keys and values and new words"


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
    version = "".join(f", {name}={config[name]!r}" for name in ("revision", "variant") if config.get(name))
    source = f"{config.get('base_model')!r}{version}"
    ours = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "from custom_diffusion import load_custom_diffusion",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({source}, torch_dtype=torch.float16).to('cuda')",
        f"load_custom_diffusion(pipe, {repo_id!r})",
        f"image = pipe({prompt!r}, num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]",
    ]
    if config.get("compressed"):
        return (
            _python(ours) + "\n\nThe weights are compressed: changes of the base model's, which only this loader reads."
        )
    plain = [
        "# _pipeline: without it, diffusers 0.29 and later load nothing, and say nothing",
        f"pipe.unet.load_attn_procs({repo_id!r}, weight_name='pytorch_custom_diffusion_weights.bin', _pipeline=pipe)",
        *(
            f"pipe.load_textual_inversion({repo_id!r}, weight_name={token + '.bin'!r})"
            for token in config.get("modifier_tokens", [])
        ),
    ]
    return f"{_python(ours)}\n\nWith diffusers alone, in place of `load_custom_diffusion`:\n\n{_python(plain)}"


def _python(lines):
    return "\n".join(["```python", *lines, "```"])


def _training(config, command):
    parts = []
    if command:
        parts.append(f"```bash\n{command}\n```")
    if config.get("steps"):
        parts.append(f"{config['steps']} optimizer steps.")
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


def main(args: argparse.Namespace) -> None:
    """Upload a folder that was trained, merged or compressed before."""
    from custom_diffusion.base_model import read_concept

    folder = Path(args.weights)
    config = read_concept("weights", args.weights).config
    repo_id = make_repository(args.hub_model_id or folder.resolve().name, args.hub_token)
    if not (folder / "README.md").is_file():
        write_card(folder, model_card(repo_id, config, samples=[]))
    if not upload(folder, repo_id, config, args.hub_token):
        raise SystemExit(1)


if __name__ == "__main__":
    run("hub", main, args)
