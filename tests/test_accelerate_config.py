"""What `accelerate config` offers and this script cannot do is refused by name, by every process before it imports anything."""

import sys

import launch
import pytest
from tiny import make_pictures

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml")
CONFIGS = {
    "FSDP": """
distributed_type: FSDP
fsdp_config: {fsdp_version: 1, fsdp_sharding_strategy: FULL_SHARD, fsdp_state_dict_type: FULL_STATE_DICT}
mixed_precision: 'no'
num_processes: 2
""",
    "DeepSpeed": """
distributed_type: DEEPSPEED
deepspeed_config: {gradient_accumulation_steps: 1, zero_stage: 2}
mixed_precision: fp16
num_processes: 2
""",
    "Megatron-LM": """
distributed_type: MEGATRON_LM
megatron_lm_config: {megatron_lm_tp_degree: 1, megatron_lm_pp_degree: 1, megatron_lm_gradient_clipping: 1.0}
mixed_precision: 'no'
num_processes: 2
""",
    "fp8": """
distributed_type: 'NO'
mixed_precision: fp8
num_processes: 1
""",
}
# The launcher asks whether these packages are there before it starts the script, which never gets to use them.
PACKAGES = {
    "DeepSpeed": {"deepspeed/__init__.py": "", "deepspeed/launcher/__init__.py": "",
                  "deepspeed/launcher/runner.py": "DEEPSPEED_ENVIRONMENT_NAME = '.deepspeed_env'",
                  "deepspeed-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: deepspeed\nVersion: 1.0\n"},
    "fp8": {"torchao/__init__.py": "",
            "torchao-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchao\nVersion: 1.0\n"},
}  # fmt: skip


@pytest.fixture
def launched(tmp_path):
    """Runs the script as this configuration says; its arguments are good ones, but that the model is never looked at."""

    def launched(name, **changes):
        (tmp_path / "config.yaml").write_text("compute_environment: LOCAL_MACHINE\nnum_machines: 1\n" + CONFIGS[name])
        for path, content in PACKAGES.get(name, {}).items():
            file = tmp_path / "packages" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        arguments = {
            "pretrained_model_name_or_path": "somebody/model",
            "instance_data_dir": make_pictures(tmp_path / "photos", 1),
            "instance_prompt": "a cat",
            "output_dir": tmp_path / "out",
        }
        environment = {"PYTHONPATH": f"{launch.ROOT}:{tmp_path / 'packages'}"}
        port = f"--main_process_port={launch.free_port()}"
        return launch.run((*LAUNCH, port, launch.SCRIPT), arguments | changes, tmp_path / "log", environment)

    return launched


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_offered_is_refused_by_name(launched, name, tmp_path):
    run = launched(name)
    assert run.status == 1, run.output  # the launcher's own
    (line,) = run.messages
    assert line.startswith(f"accelerate config: {name} ")
    instead = "--mixed_precision bf16" if name == "fp8" else "accelerate launch --multi_gpu"
    assert instead in line
    assert "custom_diffusion/" not in run.output  # no traceback of the script's own, only the launcher's
    assert not (tmp_path / "out").exists()


def test_a_precision_that_is_given_counts_for_more_than_the_configured_one(run_arguments, tmp_path):
    short = run_arguments | {"mixed_precision": "no", "max_train_steps": 1, "output_dir": tmp_path / "out"}
    launch.run(launch.FORKED, short, tmp_path / "log", {"ACCELERATE_MIXED_PRECISION": "fp8"}).ok()
