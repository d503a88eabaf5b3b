"""Sharing, with the real huggingface_hub client against a Hub on this machine: there and back."""

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version

import huggingface_hub
import pytest
import torch
from fake_concept import make_concept, run_tool
from hub_server import READ_TOKEN, TOKEN, HubServer
from launch import PLAIN, ROOT, run
from PIL import Image
from tiny import make_model, make_pictures

from custom_diffusion.cli.training_flags import build_parser
from custom_diffusion.errors import InputError
from custom_diffusion.model.source import VAE_FLAG, ModelSource, read_index, read_vae_config
from custom_diffusion.tools.share import make_repository, upload_run, write_card
from custom_diffusion.training.model_card import PATH_FLAGS, model_card, training_command
from custom_diffusion.weights.format import ConceptWeights, write_weights

CONFIG = {
    "base_model": "tester/base",
    "freeze_model": "crossattn_kv",
    "modifier_tokens": ["<new1>", "<new2>"],
    "concepts": [
        {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat"},
        {"instance_prompt": "photo of a <new2> wooden pot", "class_prompt": "wooden pot"},
    ],
    "steps": 7,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def base(server, tmp_path_factory):
    """A base model with a license, on the Hub as tester/base."""
    folder = make_model(tmp_path_factory.mktemp("base"))
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server.repositories["tester/base"] = files
    return folder


@pytest.fixture
def online(monkeypatch):
    """This process's client may ask a Hub. Older ones keep a session that was made offline, whoever made it."""
    forget = getattr(huggingface_hub, "configure_http_backend", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        forget()
        yield
    forget()


@pytest.fixture
def local_hub(server, online, monkeypatch):
    """This process's client talks to the local Hub too."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)  # older ones know no XET
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.refuse = None


@pytest.fixture(scope="module")
def pushed(server, base, tmp_path_factory):
    """A run with --push_to_hub on a base model from the Hub: its working folder and what it printed."""
    root = tmp_path_factory.mktemp("pushed")
    for number, photo in enumerate(make_pictures(root / "cat", 3).iterdir()):
        photo.rename(photo.with_name(f"aunt-mary-{number}.jpg"))
    arguments = {
        "pretrained_model_name_or_path": "tester/base",
        "instance_data_dir": root / "cat",
        "class_data_dir": root / "class",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "output_dir": root / "my-cat",
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "learning_rate": 1e-2,
        "dataloader_num_workers": 0,
        "validation_prompt": "<new1> cat in a bucket",
        "num_validation_images": 1,
        "push_to_hub": True,
        "hub_token": TOKEN,
    }
    environment = server.environment(root / "cache", token=None) | {"HF_HUB_OFFLINE": "0"}
    return root, run(PLAIN, arguments, root / "log.txt", environment).ok()


def in_client(server, cache, code, **popen):
    """Run code in a fresh process whose huggingface_hub knows the local Hub only."""
    environment = {**os.environ, **server.environment(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    command = code if isinstance(code, list) else [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **popen)


def test_exactly_what_others_need_is_uploaded(server, pushed):
    root, output = pushed
    files = server.repositories["tester/my-cat"]
    weights = "pytorch_custom_diffusion_weights"
    assert set(files) == {
        f"{weights}.safetensors", f"{weights}.bin", "<new1>.safetensors", "<new1>.bin", "custom_diffusion_config.json",
        "README.md", "curve.png", "samples/step-000000-0.png", "samples/final-0.png",
    }  # fmt: skip
    assert (root / "my-cat" / "checkpoint-2").is_dir()
    for name, content in files.items():
        assert content == (root / "my-cat" / name).read_bytes()
    assert "Uploaded to" in output
    assert "HTTP" not in output  # no line for each request


def test_the_repository_is_made_before_training_and_written_after(server, pushed):
    calls = [path for _, path in server.requests]
    weights = (i for i, path in enumerate(calls) if path.endswith("/unet/diffusion_pytorch_model.safetensors"))
    assert calls.index("/api/repos/create") < next(weights) < calls.index("/api/models/tester/my-cat/commit/main")


def test_card_says_what_it_is_and_never_the_token(server, pushed):
    card = server.repositories["tester/my-cat"]["README.md"].decode()
    assert TOKEN not in card and "hub_token" not in card
    assert "base_model: tester/base" in card and "license: creativeml-openrail-m" in card
    assert "- custom-diffusion\n" in card and "- diffusers-training\n" in card
    assert "photo of a <new1> cat" in card and "![](samples/final-0.png)\n\n`<new1> cat in a bucket`" in card
    assert "--learning_rate=0.01" in card and f"torch {version('torch')}" in card
    assert "![Losses against steps](curve.png)" in card
    assert "step-000000" not in card


def test_nothing_that_is_uploaded_names_a_photo_or_a_folder(server, pushed):
    root, _ = pushed
    for name, content in server.repositories["tester/my-cat"].items():
        for private in ("aunt-mary", str(root), root.name):
            assert private.encode() not in content, name
            assert private not in name
    config = json.loads(server.repositories["tester/my-cat"]["custom_diffusion_config.json"])
    assert config["settings"]["learning_rate"] == 1e-2
    assert config["concepts"] == [{"instance_prompt": "photo of a <new1> cat", "class_prompt": None, "num_photos": 3}]


def test_info_describes_a_repository_by_its_id(server, pushed, tmp_path):
    described = in_client(server, tmp_path, [sys.executable, "-m", "custom_diffusion", "info", "tester/my-cat"])
    assert described.returncode == 0, described.stderr
    for expected in ("tester/base", "<new1>", "photo of a <new1> cat", "crossattn_kv"):
        assert expected in described.stdout


def test_card_validates_and_draws_what_the_folder_draws(server, pushed, tmp_path):
    root, _ = pushed
    code = f"""
import re, numpy
from huggingface_hub import HfApi, RepoCard
from huggingface_hub.utils import get_session
card = RepoCard.load("tester/my-cat")
answer = get_session().post(  # as `card.validate()`, which in older clients asks huggingface.co wherever HF_ENDPOINT points
    HfApi().endpoint + "/api/validate-yaml", json={{"repoType": "model", "content": str(card)}}, headers={{"Accept": "text/plain"}}
)
assert answer.status_code == 200, answer.text
ours, plain = re.findall("```python\\n(.*?)```", card.text, re.S)
ours = ours.replace("torch.float16", "torch.float32").replace("'cuda'", "'cpu'").replace("=100", "=3")
ours = ours.replace("guidance_scale", "generator=torch.Generator().manual_seed(0), output_type='np', guidance_scale")
names = {{}}
exec(ours, names)
by_id = names["image"]
exec(ours.replace("load_custom_diffusion(pipe, 'tester/my-cat')", "load_custom_diffusion(pipe, {str(root / "my-cat")!r})"), names)
assert numpy.array_equal(by_id, names["image"])
exec(ours.replace("load_custom_diffusion(pipe, 'tester/my-cat')", plain), names)
print("plain", abs(by_id - names["image"]).max() * 255)
exec(ours.replace("load_custom_diffusion(pipe, 'tester/my-cat')", ""), names)
print("base", abs(by_id - names["image"]).max() * 255)
assert card.data.base_model == "tester/base"
"""
    result = in_client(server, tmp_path / "cache", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plain, base = (float(line.split()[1]) for line in result.stdout.splitlines())
    assert plain < 1 < base  # diffusers' own loader agrees to a grey level; without the weights it is another picture


def test_two_text_encoders_are_shared_and_drawn_by_the_card(server, tiny_xl_model, tmp_path):
    """By its own code, and by diffusers alone."""
    files = {p.relative_to(tiny_xl_model).as_posix(): p.read_bytes() for p in tiny_xl_model.rglob("*") if p.is_file()}
    server.repositories["tester/xl"] = files
    make_concept(tmp_path / "xl-cat", tiny_xl_model)
    path = tmp_path / "xl-cat" / "custom_diffusion_config.json"
    config = json.loads(path.read_text()) | {"base_model": "tester/xl", "settings": {"resolution": 64}}
    path.write_text(json.dumps(config))
    code = f"""
import re, numpy
from custom_diffusion import share
from huggingface_hub import RepoCard
assert share({str(tmp_path / "xl-cat")!r})
card = RepoCard.load("tester/xl-cat")
assert "stable-diffusion-xl" in card.data.tags and "stable-diffusion" not in card.data.tags
assert "5 optimizer steps on images of 64 x 64 pixels." in card.text
ours, plain = re.findall("```python\\n(.*?)```", card.text, re.S)
ours = ours.replace("torch.float16", "torch.float32").replace("'cuda'", "'cpu'").replace("=100", "=2")
ours = ours.replace("guidance_scale", "generator=torch.Generator().manual_seed(0), output_type='np', guidance_scale")
images, loading = [], "load_custom_diffusion(pipe, 'tester/xl-cat')"
for code in (ours, ours.replace(loading, plain), ours.replace(loading, "")):
    exec(code, names := {{}})
    images.append(names["image"])
print("differences", abs(images[0] - images[1]).max() * 255, abs(images[0] - images[2]).max() * 255)
"""
    result = in_client(server, tmp_path / "cache", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plain, base = map(float, result.stdout.split("differences ")[1].split())
    assert plain < 1 < base


def make_trained_folder(folder, config=CONFIG):
    names = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{p}.weight" for p in "kv"]
    tokens = {token: torch.ones(32) for token in CONFIG["modifier_tokens"]}
    unet = Namespace(attn_processors={})
    write_weights(folder, ConceptWeights({n: torch.ones(32, 32) for n in names}, tokens, config), unet, ("bin",))


def test_weights_are_read_by_their_id_and_nothing_else_is_fetched(server, tmp_path):
    tokens = {"<new1>": torch.ones(32), "s[k]s": torch.full((32,), 2.0)}
    tensors = {f"mid.attn2.{projection}.weight": torch.rand(3, 32) for projection in ("to_k", "to_v")}
    weights = ConceptWeights(tensors, tokens, {"modifier_tokens": list(tokens)})
    write_weights(tmp_path / "local", weights, Namespace(attn_processors={}), ("safetensors",))
    files = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    server.repositories["somebody/words"] = files | {"sks.bin": b"another", "final.png": b"0", "skks.bin": b"0"}
    code = """
import torch
from custom_diffusion import read_weights
read = read_weights("somebody/words", cache_dir="cache")
torch.save([read.tensors, read.tokens, read.config], "read.pt")
for wrong in ("somebody/nothing", "no id at all"):
    try:
        read_weights(wrong, cache_dir="cache")
    except ValueError as error:
        print(error)
"""
    result = in_client(server, tmp_path / "home", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    read_tensors, read_tokens, config = torch.load(tmp_path / "read.pt", weights_only=True)
    assert config == weights.config and list(read_tokens) == list(tokens)
    for read, written in ((read_tensors, tensors), (read_tokens, tokens)):
        assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    assert {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")} == files.keys()
    for line, wrong in zip(result.stdout.splitlines(), ("somebody/nothing", "no id at all"), strict=True):
        assert line.startswith(f"'{wrong}' is neither a folder nor a Hub repository that can be reached (")
        assert "None" not in line


def test_a_repository_without_a_diffusers_model_is_told_what_to_do(local_hub, tmp_path, monkeypatch):
    """As of those that hold a single file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    local_hub.repositories["somebody/file"] = {"x.safetensors": b"0"}
    wrong = ModelSource("somebody/file", flag="--model"), ModelSource("tester/base", vae="somebody/file")
    for source, flag, name in zip(wrong, ("--model", VAE_FLAG), ("model_index.json", "config.json")):
        with pytest.raises(InputError) as raised:
            read_index(source) if source.vae is None else read_vae_config(source)
        (line,) = raised.value.problems
        assert line.startswith(f"{flag}: 'somebody/file' cannot be read as a ") and name in line
        assert line.endswith(", or a .safetensors file that you have downloaded")


def test_failed_upload_loses_nothing_and_the_printed_command_repeats_it(local_hub, tmp_path, capsys):
    make_trained_folder(tmp_path / "my-pot")
    local_hub.refuse = "/commit/"
    repo_id = make_repository("my-pot", None, asked_by="--push_to_hub")
    args = Namespace(validation_prompt=None, hub_token=None)
    assert upload_run(args, tmp_path / "my-pot", repo_id, CONFIG, []) is False
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(re.findall("^warning: ", error, re.MULTILINE)) == 1
    command = shlex.split(re.search(r"To upload it later: (.+)", error).group(1))
    assert local_hub.repositories["tester/my-pot"] == {}
    local_hub.refuse = None
    assert command[:3] == ["python", "-m", "custom_diffusion"]
    run_tool(*command[3:])
    assert {"<new1>.bin", "<new2>.bin", "README.md"} < set(local_hub.repositories["tester/my-pot"])


def test_a_folder_shared_under_another_name_speaks_of_that_one(local_hub, tmp_path):
    make_trained_folder(tmp_path / "pot", CONFIG | {"validation_prompt": "a <new2> pot"})
    for name in ("step-000000-0", "step-000050-0", "step-000050-1"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pot" / f"{name}.png")
    (tmp_path / "pot" / "samples").mkdir()
    for path in (tmp_path / "pot").glob("step-*.png"):
        path.rename(tmp_path / "pot" / "samples" / path.name)
    run_tool("share", tmp_path / "pot", "--hub_model_id", "first")
    card = tmp_path / "pot" / "README.md"
    card.write_text(card.read_text() + "\nMy own words about 'this'.\n")
    run_tool("share", tmp_path / "pot", "--hub_model_id", "second")
    first, second = (local_hub.repositories.pop(f"tester/{name}")["README.md"].decode() for name in ("first", "second"))
    assert "'tester/first'" in first and "# Custom Diffusion: first\n" in first
    assert "first" not in second and second.count("'tester/second'") == first.count("'tester/first'") > 1
    assert "My own words about 'this'." in second
    for shown in ("samples/step-000050-0.png", "samples/step-000050-1.png"):
        assert f"![]({shown})\n\n`a <new2> pot`" in first
    assert "step-000000" not in first


def test_a_run_whose_upload_fails_says_so_by_its_status(server, base, run_arguments, tmp_path):
    arguments = {**run_arguments, "output_dir": tmp_path / "not-there", "push_to_hub": True, "max_train_steps": 1}
    server.refuse = "/commit/"
    try:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        failed = run(PLAIN, arguments, tmp_path / "log", env=environment)
    finally:
        server.refuse = None
    assert failed.status == 1 and "Traceback" not in failed.output
    assert failed.output.count("To upload it later: ") == 1
    assert (tmp_path / "not-there" / "<new1>.bin").is_file()


@pytest.mark.parametrize("place", ["/home/mary/models/sd", "./models/sd", "~/sd", "home/mary/sd", "D:\\\\sd"])
def test_a_folder_with_the_settings_of_older_versions_is_shared_without_them(place, local_hub, tmp_path):
    concepts = [concept | {"photos": ["aunt-mary.jpg"]} for concept in CONFIG["concepts"]]
    settings = {"pretrained_model_name_or_path": place, "tokenizer_name": place, "concepts": concepts, "seed": 42}
    make_trained_folder(tmp_path / "old", CONFIG | {"base_model": place, "concepts": concepts, "settings": settings})
    run_tool("share", tmp_path / "old")
    files = local_hub.repositories.pop("tester/old")
    for name, content in files.items():
        assert b"mary" not in content and place.encode() not in content, name
    config = json.loads(files["custom_diffusion_config.json"])
    assert config["concepts"] == config["settings"]["concepts"] == CONFIG["concepts"]
    assert config["settings"]["seed"] == 42


def test_a_base_model_of_the_hub_stays_named(local_hub, tmp_path):
    settings = {"pretrained_model_name_or_path": "tester/base", "tokenizer_name": None}
    make_trained_folder(tmp_path / "named", CONFIG | {"settings": settings})
    run_tool("share", tmp_path / "named")
    config = json.loads(local_hub.repositories.pop("tester/named")["custom_diffusion_config.json"])
    assert config == CONFIG | {"settings": settings}


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("my-cat", "hf_wrong", "does not accept the login"),
        ("my-cat", READ_TOKEN, "no right to write"),
        ("somebody/cat", TOKEN, "no right to write"),
        ("my cat", TOKEN, "--hub_model_id"),
    ],
)
def test_a_repository_that_cannot_be_written_is_refused_in_one_line(local_hub, name, token, expected):
    local_hub.repositories["somebody/cat"] = {}
    with pytest.raises(InputError, match=expected) as raised:
        make_repository(name, token, asked_by="--push_to_hub")
    assert len(raised.value.problems) == 1 and "\n" not in raised.value.problems[0]


@pytest.mark.parametrize("trouble", ["login", "right", "name", "answer", "network"])
def test_share_blames_only_flags_that_it_has(trouble, local_hub, tmp_path, capsys, monkeypatch):
    local_hub.repositories["somebody/cat"] = {}
    make_trained_folder(tmp_path / "cat")
    flags = {
        "login": ["--hub_token", "hf_wrong"],
        "right": ["--hub_model_id", "somebody/cat"],
        "name": ["--hub_model_id", "my cat"],
        "answer": [],
        "network": [],
    }
    if trouble == "answer":
        monkeypatch.setattr(local_hub, "refuse", "/repos/create")
    if trouble == "network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        run_tool("share", tmp_path / "cat", *flags[trouble])
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(SystemExit):
        run_tool("share", "--help")
    assert ended.value.code == 2
    has = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"--\w+", line)) <= has
    assert re.match(r"custom-diffusion share: error: --hub_(token|model_id): ", line)


def test_unreachable_hub_is_refused_in_one_line(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="--push_to_hub: cannot reach the Hub at http:") as raised:
        make_repository("my-cat", TOKEN, asked_by="--push_to_hub")
    assert "\n" not in str(raised.value)


def test_local_base_model_is_left_out_where_the_hub_refuses_it(local_hub, tmp_path, capsys):
    config = CONFIG | {"base_model": str(tmp_path)}
    write_card(tmp_path, model_card("tester/x", config, []), config)
    assert "base_model" in capsys.readouterr().err
    assert "base_model:" not in (tmp_path / "README.md").read_text().split("---")[1]


def test_card_names_every_concept():
    card = str(model_card("tester/x", CONFIG, [("samples/final-0.png", "<new1> cat")]))
    assert "| `photo of a <new1> cat` | `<new1>` |\n| `photo of a <new2> wooden pot` | `<new2>` |" in card
    assert "weight_name='<new1>.bin'" in card and "weight_name='<new2>.bin'" in card


@pytest.mark.parametrize("given", [["--hub_token", "hf_x"], ["--hub_token=hf_x"], ["--hub_t", "hf_x"], []])
def test_training_command_keeps_everything_but_the_token(given, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    argv = ["train_custom_diffusion.py", "--instance_prompt", "photo of a <new1> cat", *given, "--hub_model_id", "a/b"]
    expected = "python train_custom_diffusion.py --instance_prompt 'photo of a <new1> cat' --hub_model_id a/b"
    assert training_command(argv) == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher = "accelerate launch --mixed_precision fp16 --num_processes 2"
    assert training_command(argv) == expected.replace("python", launcher)


@pytest.mark.parametrize("joined", [True, False], ids=["--flag=value", "--flag value"])
@pytest.mark.parametrize("short", [True, False], ids=["abbreviated", "whole"])
def test_training_command_names_no_place_on_this_computer(joined, short, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    places = ["pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "concepts_list", "output_dir",
              "logging_dir", "tokenizer_name", "pretrained_vae_model_name_or_path", "config_from",
              "resume_from_checkpoint"]  # fmt: skip
    argv, expected = ["/home/mary/train_custom_diffusion.py"], ["python", "train_custom_diffusion.py"]
    for name in places:
        flag = f"--{name[:-1] if short else name}"
        argv += [f"{flag}=/home/mary/x"] if joined else [flag, "/home/mary/x"]
        expected += [f"{flag}={name.upper()}"] if joined else [flag, name.upper()]
    assert training_command([*argv, "--hflip", "--seed", "3"]) == shlex.join([*expected, "--hflip", "--seed", "3"])


def test_every_flag_of_training_that_takes_a_place_is_known():
    """A new flag is either listed as a place, or here as none."""
    none = {"help", "revision", "variant", "freeze_model", "modifier_token", "initializer_token", "instance_prompt",
            "class_prompt", "prior_generation_precision", "lr_scheduler", "validation_prompt", "report_to", "hub_token",
            "hub_model_id", "mixed_precision", "prediction_type"}  # fmt: skip
    text = {action.dest for action in build_parser()._actions if action.nargs is None and action.type is None}
    assert text - none == set(PATH_FLAGS)
