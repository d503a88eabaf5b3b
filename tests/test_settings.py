"""Every flag either changes the course of a run, and is recorded and compared when the run is resumed, or it does not."""

from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import make_pictures

from custom_diffusion.cli.concepts import Concept
from custom_diffusion.cli.training_flags import build_parser
from custom_diffusion.training.settings import check_resumable, run_settings, weights_config

# Recorded under their own name, at least where they matter: the last three with a schedule, or with a pool of latents.
COURSE = {
    "pretrained_model_name_or_path", "config_from", "revision", "variant", "tokenizer_name", "freeze_model", "initializer_token",
    "pretrained_vae_model_name_or_path", "prediction_type",
    "with_prior_preservation", "real_prior", "prior_loss_weight", "num_class_images", "resolution", "center_crop", "hflip",
    "noaug", "seed", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "use_8bit_adam", "max_grad_norm", "cache_latents", "train_batch_size",
    "gradient_accumulation_steps", "mixed_precision", "max_train_steps", "num_train_epochs", "augmentations_per_image",
}  # fmt: skip
# Recorded in what follows from them: `modifier_tokens` and `concepts`.
RECORDED_OTHERWISE = {"modifier_token", "instance_data_dir", "instance_prompt", "class_prompt", "concepts_list"}
# Where a run writes, what it reports, how it is computed, and what is drawn before it starts.
NO_COURSE = {
    "help", "class_data_dir", "sample_batch_size", "prior_generation_precision", "dataloader_num_workers", "output_dir",
    "set_grads_to_none", "checkpointing_steps", "checkpoints_total_limit", "keep_best", "resume_from_checkpoint",
    "no_safe_serialization", "validation_prompt", "num_validation_images", "validation_steps", "logging_dir", "report_to",
    "push_to_hub", "hub_token", "hub_model_id", "gradient_checkpointing", "allow_tf32",
    "enable_xformers_memory_efficient_attention", "local_rank", "cuda_graphs",
}  # fmt: skip
CONCEPTS = [Concept("photo of a <new1> cat", Path(__file__).parent, "cat", None)]


def settings(*flags):
    args = build_parser().parse_args(["--pretrained_model_name_or_path", "base", *flags])
    return run_settings(args, CONCEPTS, ["<new1>"], args.mixed_precision or "no", 4, "0" * 16, 512)


def test_every_flag_is_known_as_part_of_the_course_or_not():
    flags = {action.dest for action in build_parser()._actions}
    groups = (COURSE, RECORDED_OTHERWISE, NO_COURSE)
    assert flags == set().union(*groups)
    assert len(flags) == sum(map(len, groups))


def test_the_settings_hold_the_course_and_nothing_else():
    recorded = settings("--lr_scheduler", "cosine", "--cache_latents")
    follows = {"samples_per_step", "model_configuration", "modifier_tokens", "concepts", "base_file"}
    assert recorded.keys() == COURSE | follows


def test_flags_are_recorded_as_they_are():
    flags = ["--lr_scheduler", "cosine", "--cache_latents", "--max_train_steps", "9", "--num_train_epochs", "3"]
    args = build_parser().parse_args(["--pretrained_model_name_or_path", "base", *flags])
    recorded = settings(*flags)
    for name in COURSE - {"mixed_precision", "resolution"}:
        assert recorded[name] == getattr(args, name), name
    assert recorded["resolution"] == 512  # as it is in effect


@pytest.mark.parametrize("name", sorted(COURSE - {"train_batch_size", "gradient_accumulation_steps"}))
def test_a_flag_of_the_course_that_changes_is_told_or_refused(name):
    before = settings("--lr_scheduler", "cosine", "--cache_latents")
    now = before | {name: "another"}
    told = []
    if name in ("freeze_model", "use_8bit_adam", "prediction_type"):
        with pytest.raises(ValueError, match=name):
            check_resumable(before, now, told.append)
    else:
        check_resumable(before, now, told.append)
        (line,) = told
        assert f"{name} was {before[name]!r} in the checkpoint and is 'another' now" in line


def test_concepts_are_recorded_by_prompt_photos_and_class(tmp_path):
    make_pictures(tmp_path / "b", 2)
    concepts = [Concept("a <new1> cat", tmp_path / "b", "cat", None)]
    model = ["--pretrained_model_name_or_path", "base"]
    args = build_parser().parse_args([*model, "--with_prior_preservation"])
    recorded = run_settings(args, concepts, ["<new1>"], "bf16", 6, "digest", 512)
    assert recorded["concepts"] == [
        {"instance_prompt": "a <new1> cat", "photos": ["0.jpg", "1.jpg"], "class_prompt": "cat"}
    ]
    assert (recorded["mixed_precision"], recorded["samples_per_step"]) == ("bf16", 6)
    assert (recorded["model_configuration"], recorded["modifier_tokens"]) == ("digest", ["<new1>"])
    without = run_settings(build_parser().parse_args(model), concepts, ["<new1>"], "no", 6, "digest", 512)
    assert without["concepts"][0]["class_prompt"] is None


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        (["--lr_scheduler", "constant"], set()),
        (["--lr_scheduler", "constant_with_warmup"], set()),
        (["--lr_scheduler", "linear"], {"max_train_steps", "num_train_epochs"}),
        (["--cache_latents"], {"augmentations_per_image"}),
    ],
)
def test_flags_that_matter_only_with_others_are_recorded_with_them(flags, recorded):
    sometimes = {"max_train_steps", "num_train_epochs", "augmentations_per_image"}
    assert sometimes & settings(*flags).keys() == recorded


def test_what_is_handed_on_has_all_settings_but_the_names_of_photos(tmp_path):
    make_pictures(tmp_path / "cat", 3)
    concepts = [Concept("a <new1> cat", tmp_path / "cat", "cat", None)]
    args = build_parser().parse_args(
        ["--pretrained_model_name_or_path", "me/base", "--revision", "v1", "--variant", "fp16"]
    )
    recorded = run_settings(args, concepts, ["<new1>"], "no", 4, "digest", 512)
    config = weights_config(recorded, 7, "a <new1> cat in a bucket", "Stable Diffusion")
    versions = config.pop("versions")
    assert versions == {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    told = [{"instance_prompt": "a <new1> cat", "class_prompt": None, "num_photos": 3}]
    assert config == {
        "base_model": "me/base", "config_from": None, "base_file": None, "inpainting": False, "revision": "v1", "variant": "fp16", "family": "Stable Diffusion",
        "freeze_model": "crossattn_kv",
        "modifier_tokens": ["<new1>"], "concepts": told, "steps": 7, "validation_prompt": "a <new1> cat in a bucket",
        "settings": recorded | {"concepts": told},
    }  # fmt: skip
    assert recorded["concepts"][0]["photos"] == ["0.jpg", "1.jpg", "2.jpg"]


def test_older_checkpoints_compare_the_flags_behind_what_they_lack():
    now = settings()
    before = {name: value for name, value in now.items() if name not in ("samples_per_step", "model_configuration")}
    check_resumable(before, now, pytest.fail)
    told = []
    check_resumable(before | {"train_batch_size": 3}, now, told.append)
    assert len(told) == 1 and "train_batch_size was 3" in told[0]
    with pytest.raises(
        ValueError, match="pretrained_model_name_or_path was 'other' in the checkpoint and is 'base' now"
    ):
        check_resumable(before | {"pretrained_model_name_or_path": "other"}, now, pytest.fail)
    # What newer ones record is compared by what it means.
    check_resumable(now | {"train_batch_size": 3}, now, pytest.fail)
    check_resumable(now | {"pretrained_model_name_or_path": "moved"}, now, told.append)
    assert told[1].startswith("the base model moved") and "was 'moved' in the checkpoint and is 'base' now" in told[1]
    with pytest.raises(ValueError, match="its model, 'base', has other configuration files"):
        check_resumable(now | {"model_configuration": "other"}, now, pytest.fail)


ONE = {"name": "one.safetensors", "size": 10, "header_sha256": "a" * 64}


def test_a_single_file_is_recorded_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.safetensors").touch()
    args = build_parser().parse_args(["--pretrained_model_name_or_path", "one.safetensors", "--config_from", "me/base"])
    recorded = run_settings(args, CONCEPTS, ["<new1>"], "no", 4, "digest", 512, ONE)
    config = weights_config(recorded, 7, None, "Stable Diffusion", inpainting=True)
    assert (
        config["base_model"] == str(tmp_path / "one.safetensors") == config["settings"]["pretrained_model_name_or_path"]
    )
    assert (config["config_from"], config["base_file"], config["inpainting"]) == ("me/base", ONE, True)


@pytest.mark.parametrize("other", [{"size": 11}, {"header_sha256": "b" * 64}])
def test_a_run_does_not_go_on_with_another_file(other):
    before = settings() | {"base_file": ONE}
    with pytest.raises(
        ValueError, match=r"its model was another file \('one.safetensors', 10 bytes, header aaaaaaaaaaaa"
    ):
        check_resumable(before, before | {"base_file": ONE | other}, pytest.fail)


@pytest.mark.parametrize("other", [None, ONE | {"name": "renamed.safetensors"}])
def test_a_run_goes_on_with_the_same_model_in_another_file(other):
    before = settings() | {"base_file": ONE}
    check_resumable(before, before | {"base_file": other}, pytest.fail)
    check_resumable(before | {"base_file": other}, before, pytest.fail)
