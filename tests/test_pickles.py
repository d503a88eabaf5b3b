"""Files of others that run code when they are unpickled: refused by every tool and for every file that is read, never run."""

import pkgutil
import shutil
from pathlib import Path

import launch
import pytest
import torch
from fake_concept import make_concept, run_tool

from custom_diffusion import load_custom_diffusion, tools
from custom_diffusion.errors import InputError
from custom_diffusion.files import MANIFEST_NAME, STATE_NAME, WEIGHTS_NAME
from custom_diffusion.model.loading import load_models, load_pipeline
from custom_diffusion.model.source import ModelSource
from custom_diffusion.training.checkpoints import _checksum, read_checkpoint

TOOLS = {
    "generate": ["--prompt", "a cat", "--output", "cat.png", "--num_inference_steps", "1"],
    "merge": ["--output", "merged"],
    "compress": ["--output", "small"],
    "export": ["--to", "lora", "--output", "lora"],
    "info": [],
    "evaluate": ["--photos", str(launch.ROOT / "demo/photos"), "--output", "scores"],
    "share": [],
}
READ_NO_WEIGHTS = {"memory"}
assert TOOLS.keys() | READ_NO_WEIGHTS == {module.name for module in pkgutil.iter_modules(tools.__path__)}, (
    "a tool is missing above"
)
BASE_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Trap:
    """Pickled: a call that leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Spoils a file of tensors; at the end of the test nothing may have run."""
    monkeypatch.chdir(tmp_path)
    sprung = tmp_path / "sprung"

    def spoil(path):
        """Replace a file by a .bin of the same tensors with a call among them."""
        state = torch.load(path, weights_only=True) if path.suffix in (".bin", ".pt") else {}
        torch.save({**state, "trap": Trap(sprung)}, path.with_suffix(".pt" if path.suffix == ".pt" else ".bin"))
        if path.suffix == ".safetensors":
            path.unlink()

    yield spoil
    assert not sprung.exists()


def test_the_trap_works(tmp_path):
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.fixture
def concept(tmp_path, tiny_model):
    """A trained folder of .bin files alone."""
    make_concept(tmp_path / "concept", tiny_model)
    for path in (tmp_path / "concept").glob("*.safetensors"):
        path.unlink()
    return tmp_path / "concept"


@pytest.mark.parametrize("spoiled", [f"{WEIGHTS_NAME}.bin", "<new1>.bin"])
@pytest.mark.parametrize("tool", TOOLS)
def test_no_tool_runs_what_trained_weights_bring(tool, spoiled, concept, trap, tiny_model, tmp_path, capsys):
    trap(concept / spoiled)
    before = sorted(tmp_path.rglob("*"))
    weights = ["--weights", concept] if tool == "generate" else [concept]
    if tool == "merge":
        make_concept(tmp_path / "other", tiny_model, "<new2>")
        before = sorted(tmp_path.rglob("*"))
        weights.append(tmp_path / "other")
    with pytest.raises(SystemExit) as ended:
        run_tool(tool, *weights, *TOOLS[tool])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and spoiled in lines[0] and "damaged or not a weights file" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("spoiled", [f"{WEIGHTS_NAME}.bin", "<new1>.bin"])
def test_loading_into_a_pipeline_runs_nothing(spoiled, concept, trap, tiny_model):
    trap(concept / spoiled)
    pipeline = load_pipeline(ModelSource(str(tiny_model)), torch.float32)
    with pytest.raises(ValueError, match="damaged or not a weights file"):
        load_custom_diffusion(pipeline, concept)


@pytest.fixture
def base(tmp_path, tiny_model):
    return shutil.copytree(tiny_model, tmp_path / "base")


@pytest.mark.parametrize("part", BASE_FILES)
def test_training_and_drawing_run_nothing_that_a_base_model_brings(part, base, trap):
    trap(base / part / f"{BASE_FILES[part]}.safetensors")
    if part == "text_encoder":
        (base / part / "model.bin").rename(base / part / "pytorch_model.bin")
    source = ModelSource(str(base))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_models(source, torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match=r"cannot be (read|loaded)"):
        load_pipeline(source, torch.float32)


@pytest.mark.parametrize("tool", ["merge", "compress", "export"])
def test_no_tool_runs_what_a_base_model_brings(tool, base, trap, tiny_model, tmp_path, capsys):
    make_concept(tmp_path / "concept", tiny_model)
    make_concept(tmp_path / "other", tiny_model, "<new2>")
    trap(base / "unet" / f"{BASE_FILES['unet']}.safetensors")
    weights = ["concept", "other"] if tool == "merge" else ["concept"]
    with pytest.raises(SystemExit) as ended:
        run_tool(tool, *weights, *TOOLS[tool], "--model", base)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"--model: '{base}'" in line
    assert not {"merged", "small", "lora"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("spoiled", [STATE_NAME, f"{WEIGHTS_NAME}.bin", "<new1>.bin"])
def test_resuming_runs_nothing_that_a_checkpoint_brings(spoiled, run_arguments, trap, tmp_path):
    """Its checksums are right: whoever made it made them too."""
    whole = run_arguments | {"output_dir": tmp_path / "out", "max_train_steps": 1, "checkpointing_steps": 1}
    whole |= {"no_safe_serialization": True}
    launch.run(launch.FORKED, whole, tmp_path / "log").ok()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    manifest = (checkpoint / MANIFEST_NAME).read_text()
    checksum = _checksum(checkpoint / spoiled)
    trap(checkpoint / spoiled)
    assert checksum in manifest
    (checkpoint / MANIFEST_NAME).write_text(manifest.replace(checksum, _checksum(checkpoint / spoiled)))
    with pytest.raises(ValueError, match=r"cannot be read|damaged or not a weights file"):
        read_checkpoint(checkpoint)
    resumed = launch.run(launch.FORKED, whole | {"resume_from_checkpoint": "latest"}, tmp_path / "log2")
    assert resumed.status == 2
    assert "Traceback" not in resumed.output
