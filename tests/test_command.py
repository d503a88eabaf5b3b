"""What all commands promise: help at once, and one clear line on bad input, before anything is written."""

import argparse
import importlib
import inspect
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from fake_concept import make_concept, run_tool
from launch import ROOT

import custom_diffusion
from custom_diffusion import compress, export, generate, info, merge, read_weights, tools
from custom_diffusion.errors import InputError

TOOLS = sorted(module.name for module in pkgutil.iter_modules(tools.__path__))


@pytest.mark.parametrize("tool", TOOLS)
def test_help_answers_before_torch_is_imported(tool):
    code = f"""
import runpy, sys, resource
sys.argv = ["", "{tool}", "--help"]
try:
    runpy.run_module("custom_diffusion", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 1
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"usage: python -m custom_diffusion {tool}" in result.stdout


@pytest.mark.parametrize(
    ("script", "flag", "expected"),
    [
        ("main", "--help", "usage: custom-diffusion [-h] TOOL"),
        ("main", "nonsense", "custom-diffusion: error: argument TOOL: invalid choice: 'nonsense'"),
        ("train", "--help", "usage: train_custom_diffusion.py"),
        ("train", "--learning_rate=fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("retrieve", "--help", "usage: "),
        ("retrieve", "--num_class_images=many", "argument --num_class_images: invalid int value: 'many'"),
    ],
)
def test_installed_commands_answer_before_torch_is_imported(script, flag, expected):
    code = f"""
import sys
from custom_diffusion.__main__ import {script}
sys.argv = ["command", {flag!r}]
try:
    {script}()
except SystemExit as end:
    assert end.code == (0 if {flag!r} == "--help" else 2), end.code
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout + result.stderr


def test_the_project_installs_these_commands():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in ('custom-diffusion = "custom_diffusion.__main__:main"',
                 'custom-diffusion-train = "custom_diffusion.__main__:train"',
                 'custom-diffusion-retrieve = "custom_diffusion.__main__:retrieve"'):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_a_function_with_the_defaults_of_its_flags(tool):
    module = importlib.import_module(f"custom_diffusion.tools.{tool}")
    parser = argparse.ArgumentParser()
    module.add_flags(parser)
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    function = getattr(custom_diffusion, tool)
    assert function is getattr(module, tool) and function.__doc__
    parameters = inspect.signature(function).parameters
    assert parameters.keys() == flags.keys()
    for name, parameter in parameters.items():
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        assert (default or None) == (flags[name].default or None), name  # () and [] say the same


def test_help_shows_the_functions():
    shown = pydoc.render_doc(custom_diffusion, renderer=pydoc.plaintext)
    for name in (*TOOLS, "load_custom_diffusion", "unload_custom_diffusion", "read_weights"):
        assert f"\n    {name}(" in shown, name


@pytest.mark.parametrize(
    "tool",
    [compress, lambda w, output: export(w, to="lora", output=output), lambda w, output: merge([w, w], output=output)],
)
def test_a_function_replaces_no_folder_that_holds_anything(folders, tool):
    with pytest.raises(InputError, match="is not empty"):
        tool(folders / "cat", output=folders / "full")
    assert [p.name for p in (folders / "full").iterdir()] == ["precious.txt"]


def test_weights_are_read_once_and_handed_on(tiny_model, tmp_path, monkeypatch):
    make_concept(tmp_path / "cat", tiny_model)
    make_concept(tmp_path / "pot", tiny_model, token="<new2>", class_prompt="pot", seed=2)
    cat, pot = (read_weights(tmp_path / name) for name in ("cat", "pot"))
    options = {"prompt": "<new1> cat", "num_inference_steps": 1, "height": 32, "width": 32}
    (by_path,) = generate(tmp_path / "cat", output=tmp_path / "by_path.png", **options)
    monkeypatch.setattr("custom_diffusion.weights.format.read_weights", None)
    monkeypatch.setattr("custom_diffusion.weights.pipeline.read_weights", None)
    (by_value,) = generate(cat, output=tmp_path / "by_value.png", **options)
    assert by_value.read_bytes() == by_path.read_bytes()
    assert "rank 2" in compress(cat, output=tmp_path / "small", rank=2)
    assert "load_lora_weights" in export(cat, to="lora", output=tmp_path / "lora")
    assert ("tokens", "<new1> (32 values)") in info(cat)
    merge([cat, pot], output=tmp_path / "both")
    assert (tmp_path / "both" / "<new2>.safetensors").is_file()


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A trained folder, one without its token file, a text file, a full folder and an empty one, by name."""
    root = tmp_path_factory.mktemp("folders")
    make_concept(root / "cat", tiny_model)
    make_concept(root / "faces", tiny_model, token="<face>", crossattn=True)
    make_concept(root / "lost", tiny_model)
    for file in (root / "lost").glob("<new1>.*"):
        file.unlink()
    (root / "file.txt").write_text("a cat\n")
    (root / "full").mkdir()
    (root / "full" / "precious.txt").write_text("mine")
    (root / "empty").mkdir()
    return root


BAD = [
    (["generate", "--weights", "cat", "--prompt", "<new1>", "--output", "new/x", "--height", "100"], "--height: 100"),
    (["generate", "--weights", "cat", "--prompt", "<new9>", "--output", "new/x"], "has <new9>, but the weights bring <new1>"),
    (["generate", "--weights", "lost", "--prompt", "<new1>", "--output", "new/x"], "--weights: 'lost' lacks the embedding"),
    (["generate", "--weights", "empty", "--prompt", "a", "--output", "new/x"], "--weights: 'empty' has no pytorch_custom"),
    (["generate", "--weights", "cat", "--prompt", " ", "--output", "new/x"], "--prompt: ' ' is empty"),
    (["generate", "--weights", "cat", "--prompt", "a", "--num_images", "2", "--output", "new/x.png"], "--output: 'new/x.png' is one file for 2"),
    (["generate", "--prompt", "a", "--output", "new/x.png"], "--weights: give trained weights, or a --model"),
    (["generate", "--model", "empty", "--prompt", "a", "--output", "new/x.png"], "--model: 'empty' has no model_index.json"),
    (["generate", "--weights", "cat", "--prompt", "a", "--image", "file.txt", "--output", "new/x.png"], "--image, --mask: one is of no use"),
    (["compress", "cat", "--output", "new", "--model", "file.ckpt"], "--model: 'file.ckpt' is no file that is there"),
    (["compress", "cat", "--output", "new", "--config_from", "empty"], "--config_from: 'empty' has no model_index.json"),
    (["merge", "cat", "cat", "--output", "new", "--model", "me/base", "--config_from", "me/base"], "--config_from: is for a --model that is a single file"),
    (["export", "cat", "--to", "lora", "--output", "full"], "--output: folder 'full' is not empty"),
    (["export", "cat", "--to", "lora", "--output", "new", "--rank", "0"], "--rank: 0 must be 1 or more"),
    (["export", "cat", "--to", "pipeline", "--output", "new", "--rank", "4"], "--rank: has no meaning with --to pipeline"),
    (["export", "./nothing", "--to", "lora", "--output", "new"], "weights: folder './nothing' does not exist"),
    (["export", "cat", "--to", "lora", "--output", "new", "--revision", "main"], "--revision: needs --model"),
    (["compress", "cat", "--output", "new", "--energy", "1.5"], "--energy: 1.5 must be above 0"),
    (["compress", "cat", "--output", "file.txt"], "--output: 'file.txt' is a file"),
    (["compress", "cat", "--output", "file.txt/new"], "file.txt' is a file; choose another place"),
    (["merge", "cat", "--output", "new"], "weights: one folder has nothing to merge with"),
    (["merge", "cat", "lost", "--output", "new"], "weights: 'lost' lacks the embedding"),
    (["merge", "cat", "faces", "--output", "new"], "weights: 'faces' has trained"),
    (["merge", "cat", "cat", "--max_captions", "0", "--output", "new"], "--max_captions: 0 must be 1 or more"),
    (["merge", "cat", "cat", "--captions", "empty", "--output", "new"], "--captions: no file 'empty/caption.txt'"),
    (["info", "file.txt"], "weights: 'file.txt' is a file"),
    (["share", "./nothing"], "weights: folder './nothing' does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"), BAD, ids=lambda value: value[0] if isinstance(value, list) else value[:24]
)
def test_bad_input_is_one_line_and_leaves_nothing(folders, argv, expected, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as end:
        run_tool(*argv)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and f"custom-diffusion {argv[0]}: error: " in lines[0] and expected in lines[0]
    assert sorted(Path().rglob("*")) == before


def test_disk_trouble_is_one_line_and_leaves_nothing(folders, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("custom_diffusion.weights.format.save_tensors", full)
    with pytest.raises(SystemExit) as end:
        run_tool("compress", folders / "cat", "--output", tmp_path / "x")
    assert end.value.code == 1 and "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", TOOLS)
def test_a_function_has_the_defaults_of_its_flags(tool):
    module = importlib.import_module(f"custom_diffusion.tools.{tool}")
    parser = argparse.ArgumentParser()
    module.add_flags(parser)
    flags = {action.dest: action.default for action in parser._actions}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(module, tool)).parameters.items()
        if parameter.default is not parameter.empty
    }
    for name, default in defaults.items():
        assert flags[name] == (list(default) if isinstance(default, tuple) else default), name
