"""Checkpoint folders: small, whole or absent, checked before they are trusted, and good to draw from."""

import copy
import json
import re
import shutil

import launch
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler

from custom_diffusion import load_custom_diffusion
from custom_diffusion.files import (
    MANIFEST_NAME,
    PART,
    STATE_NAME,
    WEIGHTS_NAME,
    list_checkpoints,
    recover,
    whole_folder,
)
from custom_diffusion.training.checkpoints import (
    Checkpoint,
    _checksum,
    last_good,
    read_checkpoint,
    read_latest_checkpoint,
    remove_old_checkpoints,
    restore,
    save_checkpoint,
)
from custom_diffusion.training.settings import check_resumable
from custom_diffusion.weights.format import ConceptWeights

TENSORS = {f"mid.attn2.{p}.weight": torch.arange(6.0).reshape(2, 3) for p in ("to_k", "to_v")}


@pytest.fixture(scope="module")
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")


@pytest.fixture
def save(unet, tmp_path):
    def save(step):
        weights = ConceptWeights(TENSORS, {"<new1>": torch.arange(4.0)}, {"modifier_tokens": ["<new1>"]})
        state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3)}}}}
        return save_checkpoint(
            tmp_path, Checkpoint(step, 2 * step, weights, state, {"seed": 1}), unet, ("safetensors",)
        )

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read(save):
    checkpoint = read_checkpoint(save(3))
    assert (checkpoint.step, checkpoint.position, checkpoint.settings) == (3, 6, {"seed": 1})
    assert torch.equal(checkpoint.weights.tensors["mid.attn2.to_k.weight"], TENSORS["mid.attn2.to_k.weight"])
    assert torch.equal(checkpoint.weights.tokens["<new1>"], torch.arange(4.0))
    assert torch.equal(checkpoint.state["optimizer"]["state"][0]["exp_avg"], torch.ones(2, 3))


def test_size_for_stable_diffusion_1_4(unet, tmp_path):
    """Two moments and the weights themselves: a quarter of the 1.0 GB of `accelerator.save_state`."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    tensors = {f"{i}.attn2.{p}.weight": torch.zeros(w, 768) for i, w in enumerate(widths) for p in ("to_k", "to_v")}
    assert sum(t.numel() for t in tensors.values()) == 19_169_280
    parameters = [torch.nn.Parameter(t) for t in tensors.values()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = ConceptWeights(tensors, {"<new1>": torch.zeros(768)})
    state = {"optimizer": optimizer.state_dict()}
    path = save_checkpoint(tmp_path, Checkpoint(1, 1, weights, state, {}), unet, ("safetensors",))
    assert sum(file.stat().st_size for file in path.iterdir()) < 260e6


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "half").write_text("x")
        raise OSError("full")
    assert names(tmp_path) == []


def test_a_failed_save_keeps_the_earlier_checkpoint_of_that_step(save, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in save(1).iterdir()}

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr("custom_diffusion.training.checkpoints.save_state", fail)
    with pytest.raises(OSError, match="full"):
        save(1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == before
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_a_killed_run_left_is_removed(save, tmp_path, monkeypatch):
    for step in (1, 2):
        save(step)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove_old_checkpoints(tmp_path / "checkpoint-2", 1)
        with pytest.raises(OSError, match="killed"), whole_folder(tmp_path / "checkpoint-3") as folder:
            (folder / "half").touch()
            raise OSError("killed")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / f".step.png.1{PART}").touch()
    assert len(list(tmp_path.glob(".*"))) == 2
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "samples"]
    assert names(tmp_path / "samples") == []


# Rotation


def test_rotation_removes_the_oldest(save, tmp_path):
    for step in (2, 10, 9):
        save(step)
    remove_old_checkpoints(tmp_path / "checkpoint-10", 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    remove_old_checkpoints(tmp_path / "checkpoint-10", None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]


def test_rotation_keeps_the_best_beside_the_last(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step)
    remove_old_checkpoints(tmp_path / "checkpoint-4", 1, best=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    remove_old_checkpoints(tmp_path / "checkpoint-4", 1, best=4)
    assert names(tmp_path) == ["checkpoint-4"]


def test_rotation_keeps_what_is_not_its_own(save, tmp_path):
    for step in (1, 2, 250):
        save(step)
    (tmp_path / "checkpoint-0").mkdir()  # without a manifest: some other program's
    remove_old_checkpoints(tmp_path / "checkpoint-2", 1)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-2", "checkpoint-250"]


def test_a_checkpoint_is_out_of_sight_before_it_is_removed(save, tmp_path, monkeypatch):
    for step in (1, 2):
        save(step)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # killed before anything was removed
    remove_old_checkpoints(tmp_path / "checkpoint-2", 1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]


# Damage

DAMAGE = {
    "truncated weights": lambda path: truncate(path / f"{WEIGHTS_NAME}.safetensors"),
    "truncated state": lambda path: truncate(path / STATE_NAME),
    "one bit": lambda path: flip_bit(path / STATE_NAME),
    "state missing": lambda path: (path / STATE_NAME).unlink(),
    "token missing": lambda path: (path / "<new1>.safetensors").unlink(),
    "manifest missing": lambda path: (path / MANIFEST_NAME).unlink(),
    "manifest no JSON": lambda path: (path / MANIFEST_NAME).write_text("{"),
    "manifest of another kind": lambda path: (path / MANIFEST_NAME).write_text("[1]"),
    "manifest without files": lambda path: (path / MANIFEST_NAME).write_text('{"step": 2}'),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(damage, save, tmp_path):
    save(1)
    damage(save(2))
    with pytest.raises(ValueError, match="checkpoint-2"):
        read_checkpoint(tmp_path / "checkpoint-2")
    warnings = []
    assert read_latest_checkpoint(tmp_path, warnings.append).step == 1
    (warning,) = warnings
    assert "damaged checkpoint 'checkpoint-2'" in warning
    assert "\n" not in warning


def test_no_pickled_code_runs(save):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code from the file was run",))

    path = save(1)
    torch.save({"optimizer": Evil()}, path / STATE_NAME)
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest["files"][STATE_NAME] = _checksum(path / STATE_NAME)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=STATE_NAME):
        read_checkpoint(path)


# Resuming


def test_restoring_keeps_moments_and_takes_rates_and_decays_of_now():
    def make(rate, decay, epsilon):
        weights = [torch.nn.Parameter(torch.ones(3))]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay, eps=epsilon)
        return {
            "optimizer": optimizer,
            "lr_scheduler": get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10),
        }

    before = make(1e-3, 0.1, 1e-8)
    for step in range(3):
        before["optimizer"].param_groups[0]["params"][0].grad = torch.full((3,), step + 1.0)
        for part in before.values():
            part.step()
    state = {name: part.state_dict() for name, part in before.items()} | {"scaler": {"scale": 1.0}}  # of an fp16 run
    now = make(5e-4, 0.2, 1e-4)
    restore(now, copy.deepcopy(state))
    (group,) = now["optimizer"].param_groups
    assert group["lr"] == pytest.approx(5e-4 * 0.7) and (group["weight_decay"], group["eps"]) == (0.2, 1e-4)
    moments, kept = (part["optimizer"].state_dict()["state"][0] for part in (before, now))
    assert moments.keys() == kept.keys() and all(torch.equal(moments[name], kept[name]) for name in moments)
    for part in now.values():
        part.step()
    assert now["lr_scheduler"].get_last_lr() == [pytest.approx(5e-4 * 0.6)]


def test_where_to_go_on_from_is_told(save, tmp_path):
    assert last_good(tmp_path) == "There is no checkpoint to go back to."
    save(1)
    truncate(save(2) / STATE_NAME)
    assert last_good(tmp_path) == (
        "The last good checkpoint is checkpoint-1; repeat the command with --resume_from_checkpoint latest"
    )
    truncate(tmp_path / "checkpoint-1" / STATE_NAME)
    told = last_good(tmp_path)
    assert told.startswith("There is no checkpoint to go back to: none of the checkpoints in ")
    assert "(checkpoint-1, checkpoint-2)" in told


def test_what_is_wrong_with_a_checkpoint_is_said(save):
    path = save(1)
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    assert manifest["files"].keys() == {file.name for file in path.iterdir()} - {MANIFEST_NAME}
    for name, wrong in ((STATE_NAME, "is damaged"), (f"{WEIGHTS_NAME}.safetensors", "is missing")):
        copied = shutil.copytree(path, path.parent / wrong.removeprefix("is "))
        truncate(copied / name) if wrong == "is damaged" else (copied / name).unlink()
        with pytest.raises(ValueError, match=re.escape(f"'{copied / name}' {wrong}")):
            read_checkpoint(copied)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest | {"step": "x"}))
    with pytest.raises(ValueError, match=rf"'{path / MANIFEST_NAME}' cannot be read \(invalid literal"):
        read_checkpoint(path)
    (path / STATE_NAME).write_bytes(b"never a state")
    manifest["files"][STATE_NAME] = _checksum(path / STATE_NAME)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"'{path / STATE_NAME}' cannot be read \((?!None)"):
        read_checkpoint(path)


def test_other_flags_are_named():
    before = {"seed": 1, "train_batch_size": 2, "modifier_tokens": ["<new1>"], "concepts": [{"photos": ["a.jpg"]}]}
    check_resumable(before, dict(before), pytest.fail)
    lines = []
    check_resumable(before, before | {"seed": 2, "concepts": [{"photos": ["b.jpg"]}], "noaug": True}, lines.append)
    assert [line.split()[4] for line in lines] == ["concepts", "noaug", "seed"]
    for name in ("modifier_tokens", "freeze_model"):
        with pytest.raises(ValueError, match=f"{name} was"):
            check_resumable(before, before | {name: "other"}, pytest.fail)


@pytest.fixture(scope="module")
def run(run_arguments, tmp_path_factory):
    """Output folder and log of a run of 4 steps with a checkpoint at every second one."""
    folder = tmp_path_factory.mktemp("run")
    arguments = run_arguments | {"max_train_steps": 4, "checkpointing_steps": 2, "output_dir": folder / "out"}
    launch.Run(launch.FORKED, arguments, folder / "log").ok()
    return arguments


def without_end(run, folder):
    """The run's folder as it was before its end, damaged: checkpoint-4 misses half a file."""
    output_dir = shutil.copytree(run["output_dir"], folder / "out", ignore=shutil.ignore_patterns("*.safetensors.*"))
    truncate(output_dir / "checkpoint-4" / STATE_NAME)
    for file in output_dir.glob("*.*"):
        file.unlink()
    return run | {"output_dir": output_dir, "resume_from_checkpoint": "latest"}


def test_resuming_past_a_damaged_checkpoint_under_other_harmless_flags(run, tmp_path, trained_difference):
    resumed = launch.Run(
        launch.FORKED, without_end(run, tmp_path) | {"dataloader_num_workers": 2}, tmp_path / "log"
    ).ok()
    assert "damaged checkpoint 'checkpoint-4'" in resumed
    assert "Resuming from checkpoint-2" in resumed
    assert "different run" not in resumed
    assert trained_difference(run["output_dir"], tmp_path / "out") == 0
    assert read_checkpoint(tmp_path / "out" / "checkpoint-4").step == 4


def test_resuming_with_two_processes_continues_the_sequence_of_samples(run, tmp_path, trained_difference):
    arguments = without_end(run, tmp_path) | {"train_batch_size": 1}
    runs = launch.run_group(2, arguments, tmp_path / "log")
    for process in runs:
        process.ok()
    assert "different run" not in runs[0].output
    assert trained_difference(run["output_dir"], tmp_path / "out") < 1e-5


def test_resuming_under_other_flags_follows_them(run, tmp_path):
    arguments = without_end(run, tmp_path) | {"learning_rate": 5e-4, "seed": 7}
    output = launch.Run(launch.FORKED, arguments, tmp_path / "log").ok()
    assert "learning_rate was 0.001 in the checkpoint and is 0.0005 now" in output
    assert "seed was 42 in the checkpoint and is 7 now" in output
    assert "lr=0.0005" in output
    assert "lr=0.001" not in output


def test_starting_anew_where_checkpoints_are_is_told(run, tmp_path):
    shutil.copytree(run["output_dir"], tmp_path / "out")
    shutil.copytree(run["output_dir"] / "checkpoint-4", tmp_path / "out" / "checkpoint-10")
    arguments = run | {"output_dir": tmp_path / "out", "max_train_steps": 1}
    output = launch.Run(launch.FORKED, arguments, tmp_path / "log").ok()
    assert f"'{tmp_path / 'out'}' holds checkpoint-10 of an earlier run. This run starts anew" in output
    assert "repeat the command with --resume_from_checkpoint latest" in output


def test_other_tokens_are_refused(run, tmp_path):
    changes = {"modifier_token": "<new2>", "instance_prompt": "photo of a <new2> cat"}
    refused = launch.run(launch.FORKED, without_end(run, tmp_path) | changes, tmp_path / "log")
    assert refused.status == 2
    (message,) = refused.messages
    assert "modifier_tokens was ['<new1>'] in the checkpoint and is ['<new2>'] now" in message


def test_a_checkpoint_can_be_drawn_from(run, tiny_model):
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    before = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.clone()
    load_custom_diffusion(pipe, run["output_dir"] / "checkpoint-2")
    assert not torch.equal(before, pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight)
    assert pipe.tokenizer.convert_tokens_to_ids("<new1>") == len(pipe.tokenizer) - 1
