"""The versions that are promised: declared, pinned, refused where they would do harm, and the traps between them."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_concept import make_concept
from launch import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import make_pictures
from transformers import CLIPTextModel

from custom_diffusion.errors import InputError
from custom_diffusion.model.loading import load_models, load_pipeline, load_text_encoder
from custom_diffusion.model.source import ModelSource

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


# Declared and pinned


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def declared():
    """requirements.txt, and what the tests need besides."""
    [extra] = re.findall(r"^test = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return requirements("requirements.txt") + [Requirement(text) for text in ast.literal_eval(extra)]


def pins(name):
    pinned = requirements(name)
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in pinned)
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in pinned}


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_both_ends_of_every_range_are_pinned(requirement):
    name = canonicalize_name(requirement.name)
    oldest, newest = pins("requirements-oldest.txt").get(name), pins("constraints.txt")[name]
    assert newest in requirement.specifier
    if (
        name == "torch"
    ):  # every old one for Linux brings gigabytes of CUDA; requirements-oldest.txt says how 2.6 was tried
        assert oldest in requirement.specifier
    else:
        assert [oldest] == [Version(s.version) for s in requirement.specifier if s.operator == ">="]


# Refused


@pytest.fixture
def older_diffusers(tmp_path):
    """An environment in which diffusers says that it is the last that rounds."""
    (tmp_path / "diffusers-0.32.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: diffusers\nVersion: 0.32.2\n"
    (tmp_path / "diffusers-0.32.2.dist-info" / "METADATA").write_text(metadata)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def run_commands(tiny_model, tmp_path):
    photos = make_pictures(tmp_path / "photos", 1)
    make_concept(tmp_path / "cat", tiny_model)
    yield [str(ROOT / "train_custom_diffusion.py"), "--pretrained_model_name_or_path", tiny_model, "--instance_data_dir",
           photos, "--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>", "--output_dir", "out"]  # fmt: skip
    yield ["-m", "custom_diffusion", "generate", "--weights", tmp_path / "cat", "--prompt", "a", "--output", "out"]


def test_diffusers_that_rounds_is_refused_in_one_line_before_torch_is_imported(older_diffusers, tiny_model, tmp_path):
    for command in run_commands(tiny_model, tmp_path):
        result = subprocess.run(
            [sys.executable, "-X", "importtime", *command], env=older_diffusers, cwd=tmp_path, capture_output=True, text=True
        )  # fmt: skip
        lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
        assert result.returncode == 2 and len(lines) == 1, lines
        assert "error: diffusers 0.32.2 is installed" in lines[0] and "0.33 or newer" in lines[0]
        assert "| torch\n" not in result.stderr and not (tmp_path / "out").exists()


# Traps between versions


def rewrite_text_encoder(model, folder, change):
    """A copy of the model whose text encoder's file holds `change(tensors)`."""
    shutil.copytree(model, folder)
    file = folder / "text_encoder" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return ModelSource(str(folder))


def without_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("final_layer_norm.weight")}


def test_text_encoder_that_lacks_weights_is_refused_instead_of_random(tiny_model, tmp_path):
    source = rewrite_text_encoder(tiny_model, tmp_path / "model", without_one)
    device = torch.device("cpu")
    loaders = [
        lambda: load_models(source, torch.float32, device),
        lambda: load_text_encoder(source, device),
        lambda: load_pipeline(source, torch.float32),
    ]
    for load in loaders:
        with pytest.raises(InputError, match="1 weights of its text encoder are missing") as raised:
            load()
        assert str(raised.value).startswith("--model: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["old names", "new names"])
def test_text_encoder_is_read_exactly_or_refused_whatever_version_wrote_it(tiny_model, tmp_path, prefix):
    """transformers 5.6 leaves out `text_model.` in new files; older ones take such a file for one without weights."""

    def rename(tensors):
        return {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}

    source = rewrite_text_encoder(tiny_model, tmp_path / "model", rename)
    expected = CLIPTextModel.from_pretrained(tiny_model, subfolder="text_encoder").state_dict()
    try:
        read = load_text_encoder(source, torch.device("cpu")).state_dict()
    except InputError as error:
        assert prefix == "" and "pip install --upgrade transformers" in str(error)
        return
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_half_precision_files_start_training_in_float32(tiny_model, tmp_path):
    """transformers 5 loads in the precision of the file, older ones in float32, and each names the argument otherwise."""
    source = rewrite_text_encoder(tiny_model, tmp_path / "model", lambda t: {n: x.half() for n, x in t.items()})
    _, text, _ = load_models(source, torch.float32, torch.device("cpu"))
    assert {parameter.dtype for parameter in text.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_text_encoder(source, torch.device("cpu")).parameters()} == {
        torch.float32
    }


# Python


def interpreter(version):
    """A Python of this version, or None: on the PATH, or one of pyenv's, which are on it only by name."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for python in (f"python{version}", *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))):
        if shutil.which(python) and subprocess.run([python, "-V"], capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.parametrize("version", PYTHONS)
def test_every_python_reads_the_source(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    code = "import ast, sys; [ast.parse(open(name, encoding='utf-8').read(), name) for name in sys.argv[1:]]"
    folders = ("custom_diffusion", "tests", "demo", "benchmarks")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    read = subprocess.run([python, "-W", "error", "-c", code, *map(str, files)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr


# Beside what people have. uv reads nothing but metadata, for Pythons and systems other than this one too.


def resolve(*others, python="3.11", platform="x86_64-manylinux_2_28", wheels_only=True):
    """Name -> version of what requirements.txt comes to, with `others` beside it; fails if they exclude each other."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate",
               "--python-version", python, "--python-platform", platform]  # fmt: skip
    environment = {**os.environ, "UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"}
    wanted = (ROOT / "requirements.txt").read_text() + "".join(f"{other}\n" for other in others)
    result = subprocess.run(
        [*command, *(["--only-binary", ":all:"] if wheels_only else [])],
        input=wanted, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    if re.search("error sending request|Failed to fetch|Could not connect|timed out", result.stderr):
        pytest.skip(f"the package index cannot be asked: {result.stderr.strip().splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    found = (Requirement(line.partition(";")[0]) for line in result.stdout.splitlines() if "==" in line)
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in found}


@pytest.mark.index
@pytest.mark.parametrize("version", PYTHONS)
def test_every_python_has_wheels(version):
    assert resolve(python=version)["diffusers"] >= Version("0.41")


@pytest.mark.index
@pytest.mark.parametrize("platform", ["windows", "aarch64-apple-darwin", "aarch64-manylinux_2_28"])
def test_every_system_has_wheels(platform):
    assert resolve(python="3.12", platform=platform)["diffusers"] >= Version("0.41")


@pytest.mark.index
@pytest.mark.parametrize(
    "others",
    [
        ("xformers", "bitsandbytes", "torchvision"),
        ("transformers==5.5.4", "huggingface_hub==1.22.*"),  # OneTrainer
        ("transformers==5.5.3", "huggingface_hub==1.23.*"),  # ai-toolkit
        ("diffusers==0.36.*", "transformers==4.57.*", "huggingface_hub<1"),
        ("diffusers==0.33.*", "transformers==4.54.1", "huggingface_hub==0.34.3"),  # sd-scripts, but for its diffusers
    ],
    ids=" ".join,
)
def test_beside_what_people_have(others):
    found = resolve(*others)
    assert all(name in found for name in (canonicalize_name(Requirement(other).name) for other in others))


@pytest.mark.index
def test_beside_clip_retrieval():
    found = resolve("clip-retrieval==2.45.0", "setuptools<70", wheels_only=False)  # a dependency has no wheel
    assert found["numpy"] < Version("2") and found["diffusers"] >= Version("0.33")
