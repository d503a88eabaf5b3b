"""Whatever users get wrong: one clear line each, naming flag or file and the remedy, status 2, and nothing written."""

import json
import shutil
from pathlib import Path

import launch
import pytest
import torch
from fake_concept import run_tool
from PIL import Image
from safetensors.torch import save_file
from tiny import make_pictures

from custom_diffusion.cli.training_flags import parse_args
from custom_diffusion.errors import InputError
from custom_diffusion.files import LORA_FILE, MODEL_INDEX, WEIGHTS_NAME
from custom_diffusion.model.loading import load_tokenizer
from custom_diffusion.model.source import ModelSource, check_model
from custom_diffusion.model.tokens import token_problems
from custom_diffusion.weights.format import read_weights

# Seen by flags alone

CONCEPT = {
    "instance_prompt": "a <new1> cat",
    "class_prompt": "cat",
    "instance_data_dir": "photos",
    "class_data_dir": "class",
}


@pytest.fixture
def desk(run_arguments, tmp_path, monkeypatch):
    """A folder to work in, with photos and class images; returns good flags that name them relatively."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_arguments["instance_data_dir"], "photos")
    shutil.copytree(run_arguments["class_data_dir"], "class")
    return run_arguments | {"instance_data_dir": "photos", "class_data_dir": "class", "output_dir": "out"}


def problems_of(arguments, capsys):
    """The lines that the flags' check ends with."""
    with pytest.raises(SystemExit) as ended:
        parse_args(launch.flags(**arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("train_custom_diffusion.py: error: ") for line in lines)
    return [line.removeprefix("train_custom_diffusion.py: error: ") for line in lines]


def test_good_flags_pass(desk):
    _, (concept,) = parse_args(launch.flags(**desk))
    assert len(concept.photos()) == 5


FLAGS = [
    ({"instance_data_dir": "nowhere"}, "--instance_data_dir: folder 'nowhere' does not exist"),
    ({"instance_data_dir": None}, "--instance_data_dir: is missing"),
    ({"instance_prompt": None, "modifier_token": None}, "--instance_prompt: is missing"),
    ({"instance_prompt": "photo of a cat", "modifier_token": None, "class_prompt": " "}, "--class_prompt: is missing"),
    ({"class_data_dir": None}, "--class_data_dir: is missing"),
    ({"class_data_dir": "nowhere"}, "--class_data_dir: 'nowhere' has 0 of 7 class images; run: python retrieve.py"),
    ({"num_class_images": 8}, "--class_data_dir: 'class' has 7 of 8 class images; run: python retrieve.py"),
    ({"with_prior_preservation": False}, "--real_prior: needs --with_prior_preservation"),
    ({"modifier_token": None}, "--instance_prompt: '<new1>' is not one of the modifier tokens"),
    ({"validation_prompt": "a <new2> cat"}, "--validation_prompt: '<new2>' is not one of the modifier tokens"),
    ({"modifier_token": "<new1>+<new1>"}, "--modifier_token: '<new1>' is given more than once"),
    ({"modifier_token": "<new1>+", "validation_prompt": None}, "--modifier_token: '' is empty"),
    ({"modifier_token": "../x", "instance_prompt": "a ../x cat"}, "--modifier_token: '../x' cannot be a file name"),
    ({"modifier_token": "a\\b", "instance_prompt": "a\\b"}, "--modifier_token: 'a\\\\b' cannot be a file name"),
    ({"modifier_token": "a b", "instance_prompt": "a b"}, "--modifier_token: 'a b' is empty or has white space"),
    ({"modifier_token": "x" * 300, "instance_prompt": "x" * 300}, "cannot be a file name"),
    ({"modifier_token": "<a>+<a>b", "instance_prompt": "<a> <a>b"}, "--modifier_token: '<a>' is part of '<a>b'"),
    ({"initializer_token": ""}, "--initializer_token: '' has an empty part"),
    ({"initializer_token": "ktn", "modifier_token": "<new1>+<b>", "instance_prompt": "<new1> <b>"}, "--initializer_token: 1 for 2"),
    ({"pretrained_vae_model_name_or_path": ""}, "--pretrained_vae_model_name_or_path: '' is no folder"),
    ({"pretrained_vae_model_name_or_path": "./none"}, "--pretrained_vae_model_name_or_path: './none' is no folder"),
    ({"pretrained_vae_model_name_or_path": __file__}, "is a file, but no .safetensors; give one, or a folder in"),
    ({"pretrained_vae_model_name_or_path": "vae.safetensors"}, "'vae.safetensors' is no file that is there; download it"),
    ({"pretrained_vae_model_name_or_path": "."}, "--pretrained_vae_model_name_or_path: '.' has no config.json; give"),
    ({"resolution": 0}, "--resolution: 0 must be greater than 0"),
    ({"resolution": -64}, "--resolution: -64 must be greater than 0"),
    ({"learning_rate": "nan"}, "--learning_rate: nan must be a finite number"),
    ({"learning_rate": "inf"}, "--learning_rate: inf must be a finite number"),
    ({"learning_rate": -1e-5}, "--learning_rate: -1e-05 must be greater than 0"),
    ({"prior_loss_weight": -1}, "--prior_loss_weight: -1.0 must be 0 or more"),
    ({"adam_beta2": 1}, "--adam_beta2: 1.0 must be at least 0 and less than 1"),
    ({"adam_epsilon": 0}, "--adam_epsilon: 0.0 must be greater than 0"),
    ({"train_batch_size": 0}, "--train_batch_size: 0 must be greater than 0"),
    ({"max_train_steps": -1}, "--max_train_steps: -1 must be greater than 0"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: 0 must be greater than 0"),
    ({"checkpointing_steps": 0}, "--checkpointing_steps: 0 must be greater than 0"),
    ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit: 0 must be greater than 0"),
    ({"dataloader_num_workers": -1}, "--dataloader_num_workers: -1 must be 0 or more"),
    ({"seed": -1}, "--seed: -1 must be 0 or more"),
    ({"seed": 2**32}, "--seed: 4294967296 must be at most"),
    ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint: no checkpoint 'checkpoint-7' in 'out' (there: none)"),
    ({"output_dir": "photos/0.jpg"}, "--output_dir: 'photos/0.jpg' is a file"),
    ({"output_dir": "photos/0.jpg/out"}, "--output_dir: '{desk}/photos/0.jpg' is a file"),
    ({"output_dir": ""}, "--output_dir: is empty"),
    ({"output_dir": "class/images", "logging_dir": "0.jpg"}, "--logging_dir: 'class/images/0.jpg' is a file"),
    ({"hub_token": "secret", "report_to": "wandb"}, "--hub_token: with --report_to wandb"),
    ({"push_to_hub": True}, "--push_to_hub: not logged in to the Hub"),
    ({"push_to_hub": True, "hub_token": "x", "hub_model_id": "a/b/c"}, "--hub_model_id: 'a/b/c' cannot be a repository"),
    ({"pretrained_model_name_or_path": "photos/0.jpg"}, "--pretrained_model_name_or_path: 'photos/0.jpg' is a file"),
    ({"pretrained_model_name_or_path": "photos"}, "--pretrained_model_name_or_path: 'photos' is not a diffusers model"),
    ({"pretrained_model_name_or_path": "nowhere.safetensors"}, "'nowhere.safetensors' is no file that is there"),
    ({"pretrained_model_name_or_path": "me/cat/x.safetensors"}, "is no file that is there; download it if it is on the web, and"),
    ({"pretrained_model_name_or_path": "https://hub/me/cat"}, "'https://hub/me/cat' does not exist; give a folder with"),
    ({"pretrained_vae_model_name_or_path": "https://hub/me/vae"}, "'https://hub/me/vae' is no folder; give a VAE's folder"),
    ({"config_from": "me/base"}, "--config_from: is for a --pretrained_model_name_or_path that is a single file, which '"),
    ({"pretrained_model_name_or_path": "./nowhere"}, "--pretrained_model_name_or_path: folder './nowhere' does not exist"),
    ({"real_prior": False, "class_data_dir": "photos"}, "--class_data_dir: 'photos' holds photos"),
    ({"real_prior": False, "class_data_dir": "photos/0.jpg"}, "--class_data_dir: 'photos/0.jpg' is a file"),
    ({"class_data_dir": "photos/0.jpg"}, "--class_data_dir: 'photos/0.jpg' is a file"),
    ({"instance_data_dir": "photos/0.jpg"}, "--instance_data_dir: 'photos/0.jpg' is a file"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), FLAGS, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_flags(changes, expected, desk, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (line,) = problems_of(desk | changes, capsys)
    assert expected.replace("{desk}", str(tmp_path)) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class", "photos"]


SOMETHING_ELSE = {
    "old.ckpt": ("", "is a pickle, which can run code"),
    "x.safetensors": ("<html>", "is damaged (it does not begin as a safetensors file does)"),
    f"lora/{LORA_FILE}": ("", "is a LoRA; Stable Diffusion 1.x, 2.x and XL models are supported"),
    "control/config.json": (
        '{"_class_name": "ControlNetModel"}',
        "is a single part of a model, ControlNetModel; Stable",
    ),
    "text/config.json": ('{"architectures": ["CLIPTextModel"]}', "is a single part of a model, CLIPTextModel; Stable"),
    f"cat/{WEIGHTS_NAME}.bin": ("", "is a trained folder of Custom Diffusion, not the model it was trained on; Stable"),
    "broken/config.json": ("[]", f"no {MODEL_INDEX}"),
}


@pytest.mark.parametrize("door", ["train", "generate"])
@pytest.mark.parametrize(
    ("name", "content", "expected"), [(n, *v) for n, v in SOMETHING_ELSE.items()], ids=SOMETHING_ELSE
)
def test_a_model_that_is_something_else(door, name, content, expected, desk, capsys):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(content)
    model = name.split("/")[0]
    if door == "train":
        (line,) = problems_of(desk | {"pretrained_model_name_or_path": model}, capsys)
    else:
        with pytest.raises(SystemExit):
            run_tool("generate", "--model", model, "--prompt", "a", "--output", "x.png")
        (line,) = capsys.readouterr().err.splitlines()
    assert f": '{model}' " in line and expected in line


def test_flags_that_a_single_file_does_not_take(desk, capsys):
    save_file({"x": torch.zeros(1)}, "x.safetensors")
    given = {
        "pretrained_model_name_or_path": "x.safetensors",
        "revision": "v1",
        "variant": "fp16",
        "config_from": "photos",
    }
    lines = problems_of(desk | given, capsys)
    assert [line.split(":")[0] for line in lines] == ["--revision", "--variant", MODEL_FLAG, "--config_from"]
    assert f"'photos' has no {MODEL_INDEX}" in lines[3]


@pytest.mark.parametrize("tracker", ["wandb", "all"])
def test_wandb_without_a_login_is_told_before_anything_is_loaded(tracker, run_arguments, tmp_path):
    arguments = run_arguments | {"output_dir": tmp_path / "out", "report_to": tracker}
    home = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    failed = launch.run(launch.PLAIN, arguments, tmp_path / "log", env=home)
    assert failed.status == 2, failed.output
    assert failed.messages == [f"--report_to {tracker}: not logged in; run `wandb login`, or set WANDB_MODE=offline"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "module", "changes"),
    [
        ("--use_8bit_adam", "bitsandbytes", {"use_8bit_adam": True}),
        (
            "--enable_xformers_memory_efficient_attention",
            "xformers",
            {"enable_xformers_memory_efficient_attention": True},
        ),
        ("--report_to wandb", "wandb", {"report_to": "wandb"}),
        ("--report_to comet_ml", "comet_ml", {"report_to": "comet_ml"}),
    ],
)
def test_packages_that_are_not_installed(flag, module, changes, desk, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else name)
    (line,) = problems_of(desk | changes, capsys)
    assert line.startswith(f"{flag}: the package '{module}' is not installed; run `pip install {module}`")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["learning_rate", "prior_loss_weight", "adam_weight_decay", "adam_epsilon", "adam_beta1"]
)
def test_rates_that_are_no_numbers(name, value, desk, capsys):
    (line,) = problems_of(desk | {name: value}, capsys)
    assert line.startswith(f"--{name}: {value} must be a finite number")


def test_all_mistakes_are_told_at_once(desk, capsys):
    changes = {"learning_rate": -1, "instance_data_dir": "nowhere", "num_class_images": 9, "output_dir": "photos/0.jpg"}
    lines = problems_of(desk | changes | {"instance_prompt": "a cat"}, capsys)
    told = {line.split(":")[0] for line in lines}
    assert told == {"--learning_rate", "--instance_data_dir", "--class_data_dir", "--output_dir", "--instance_prompt",
                    "--modifier_token"}  # fmt: skip


# Pictures


def spoil(name):
    return {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
        "zero bytes": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("hello"),
        "half a header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    }[name]


@pytest.mark.parametrize("damage", ["truncated", "zero bytes", "text", "half a header"])
@pytest.mark.parametrize("picture", ["photos/3.jpg", "class/images/3.jpg"])
def test_unreadable_pictures_are_named(damage, picture, desk, tmp_path, capsys):
    spoil(damage)(tmp_path / picture)
    (line,) = problems_of(desk, capsys)
    assert f"cannot read image '{picture}'" in line
    assert "replace it" in line


def test_other_files_among_the_photos_are_passed_over(desk, tmp_path):
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "photos" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "photos" / "._0.jpg").write_bytes(b"x")
    (tmp_path / "photos" / "notes.txt").write_text("x")
    (tmp_path / "photos" / "folder.jpg").mkdir()
    _, (concept,) = parse_args(launch.flags(**desk))
    assert [path.name for path in concept.photos()] == [f"{i}.jpg" for i in range(5)]


def test_pictures_of_every_kind_are_accepted(desk, tmp_path):
    photos = tmp_path / "photos"
    picture = Image.new("RGB", (80, 60))
    exif = picture.getexif()
    exif[0x112] = 99  # no such orientation
    picture.save(photos / "orientation.JPG", exif=exif)
    picture.save(photos / "garbage.jpeg", exif=b"Exif\0\0garbage")
    picture.convert("CMYK").save(photos / "cmyk.jpg")
    picture.convert("P").save(photos / "palette.png", transparency=0)
    picture.convert("L").save(photos / "grey.webp")
    Image.new("I;16", (80, 60)).save(photos / "deep.png")
    Image.new("RGBA", (1, 1)).save(photos / "dot.png")
    Image.new("RGB", (2, 300)).save(photos / "line.bmp")
    Image.new("RGB", (9, 9)).save(photos / "without a suffix", format="PNG")
    _, (concept,) = parse_args(launch.flags(**desk))
    assert len(concept.photos()) == 14


def test_a_folder_without_pictures(desk, tmp_path, capsys):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    shutil.copy(tmp_path / "photos" / "0.jpg", tmp_path / "empty" / "deeper")
    (line,) = problems_of(desk | {"instance_data_dir": "empty"}, capsys)
    assert line.startswith("--instance_data_dir: no image in folder 'empty'")


def test_a_class_folder_that_is_not_aligned(desk, tmp_path, capsys):
    captions = tmp_path / "class" / "caption.txt"
    captions.write_text("".join(captions.read_text().splitlines(keepends=True)[:-1]))
    (line,) = problems_of(desk, capsys)
    assert "images.txt has 7 lines but caption.txt has 6" in line
    (tmp_path / "class" / "images" / "2.jpg").unlink()
    captions.write_text("a\n" * 7)
    (line,) = problems_of(desk, capsys)
    assert "images.txt lists 1 of 7 images that do not exist, first 'images/2.jpg'" in line
    captions.unlink()
    captions.mkdir()
    (line,) = problems_of(desk, capsys)
    assert "caption.txt" in line


# The concepts list

BAD_LISTS = [
    (b"", "line 1, column 1: not valid JSON"),
    (b'[{"instance_prompt": "x",\n]', "line 2, column 1: not valid JSON"),
    ('["é"]'.encode("latin-1"), "line 1: is not UTF-8 text; save it as UTF-8"),
    (b"{}", "line 1: must be a list of concepts like [{instance_prompt"),
    (b"[]", "line 1: must be a list of concepts"),
    (b"null", "line 1: must be a list of concepts"),
    (b"[\n\n3]", "line 3: concept 1 must be an object"),
    (b"[" * 100_000, "nested too deep"),
    (json.dumps([CONCEPT, CONCEPT | {"class_prompt": 3}], indent=1).encode(), "concept 2 at line 8: key 'class_prompt' must be"),
    (json.dumps([{k: v for k, v in CONCEPT.items() if k != "class_data_dir"}]).encode(), "key 'class_data_dir' is missing"),
    (json.dumps([CONCEPT | {"instance_data_dir": ""}]).encode(), "key 'instance_data_dir' is missing or empty"),
    (json.dumps([CONCEPT | {"instance_data_dir": "nowhere"}]).encode(), "'instance_data_dir': folder 'nowhere' does not exist"),
    (json.dumps([CONCEPT | {"instance_prompt": "a cat"}, CONCEPT]).encode(), "concept 1 at line 1: 'instance_prompt': 'a cat' has"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), BAD_LISTS, ids=[expected[:40] for _, expected in BAD_LISTS])
def test_malformed_concepts_lists(content, expected, desk, tmp_path, capsys):
    (tmp_path / "list.json").write_bytes(content)
    line, *others = problems_of(desk | {"concepts_list": "list.json"}, capsys)
    assert line.startswith("--concepts_list: 'list.json'")
    assert expected in line
    assert not others


def test_a_concepts_list_that_is_not_there(desk, capsys):
    for name, reason in (("none.json", "No such file"), ("photos", "Is a directory")):
        (line,) = problems_of(desk | {"concepts_list": name}, capsys)
        assert line.startswith(f"--concepts_list: '{name}' cannot be read ({reason}")


def test_a_concepts_list_as_windows_writes_it(desk, tmp_path):
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps([CONCEPT]).replace(",", ",\r\n"))
    flags_of_concept = dict.fromkeys(CONCEPT)
    _, concepts = parse_args(launch.flags(**desk | flags_of_concept | {"concepts_list": "list.json"}))
    assert concepts[0].instance_prompt == "a <new1> cat"


def test_two_classes_cannot_share_a_folder_of_generated_images(desk, tmp_path, capsys):
    shared = [CONCEPT, CONCEPT | {"class_prompt": "dog", "instance_prompt": "a <new1> dog"}]
    (tmp_path / "list.json").write_text(json.dumps(shared))
    (line,) = problems_of(desk | {"concepts_list": "list.json", "real_prior": False}, capsys)
    assert "'class' is also for class 'cat'" in line


# Seen with the model's configuration and tokenizer


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


MODEL_FLAG = "--pretrained_model_name_or_path"
MODELS = {
    "no JSON": (lambda m: (m / "unet" / "config.json").write_text("{"), "cannot be read as a diffusers model"),
    "no UNet": (lambda m: shutil.rmtree(m / "unet"), "cannot be read as a diffusers model"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "cannot be read as a diffusers model"),
    "SDXL without its second tokenizer": (
        lambda m: edit(m / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
                       _class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline; Stable Diffusion 1.x, 2.x"),
    "refiner": (
        lambda m: edit(m / "model_index.json", text_encoder=[None, None], tokenizer=[None, None],
                       text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
                       tokenizer_2=["transformers", "CLIPTokenizer"], _class_name="StableDiffusionXLImg2ImgPipeline"),
        "is a StableDiffusionXLImg2ImgPipeline, the refiner of Stable Diffusion XL; Stable Diffusion 1.x, 2.x and XL"),
    "Flux": (
        lambda m: (m / "model_index.json").write_text(json.dumps({
            "_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"]})), "is a FluxPipeline; Stable Diffusion 1.x, 2.x and XL"),
    "other conditions": (
        lambda m: edit(m / "unet" / "config.json", addition_embed_type="text_time"), "takes conditions that a"),
    "depth-to-image": (lambda m: edit(m / "unet" / "config.json", in_channels=5), "takes 5 input channels"),
    "other width": (lambda m: edit(m / "unet" / "config.json", cross_attention_dim=48), "of another width"),
    "other noise": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler"),
        "another kind of noise than Stable Diffusion, as its EDMDPMSolverMultistepScheduler says"),
    "sample prediction": (lambda m: edit(m / "scheduler" / "scheduler_config.json", prediction_type="sample"), "'sample' is not"),
    "no weights": (lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "/unet' has no weight files"),
    "truncated": (lambda m: truncate(m / "unet" / "diffusion_pytorch_model.safetensors"), "model.safetensors' is damaged"),
    "not safetensors": (lambda m: (m / "text_encoder" / "model.safetensors").write_text("<html>"), "model.safetensors' is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_taught(damage, expected, model):
    damage(model)
    with pytest.raises(InputError) as error:
        check_model(ModelSource(str(model), flag=MODEL_FLAG))
    (line,) = error.value.problems
    assert line.startswith("--pretrained_model_name_or_path: '")
    assert expected in line


def test_a_variant_that_the_model_lacks(model):
    with pytest.raises(InputError) as error:
        check_model(ModelSource(str(model), variant="fp16"))
    assert "/unet' has no weight files with '.fp16' in their name" in error.value.problems[0]


@pytest.mark.parametrize("tokenizer", [None, "nowhere"])
def test_a_tokenizer_that_is_not_there(tokenizer, model):
    shutil.rmtree(model / "tokenizer")
    flag = "--tokenizer_name" if tokenizer else "--pretrained_model_name_or_path"
    with pytest.raises(InputError, match=f"^{flag}: .* has no tokenizer that can be read"):
        load_tokenizer(ModelSource(str(model), tokenizer=tokenizer, flag=MODEL_FLAG))


@pytest.mark.parametrize(
    ("pair", "prompt", "expected"),
    [
        (("cat", "ktn"), "a cat", "--modifier_token: the tokenizer already has 'cat'"),
        (("a", "ktn"), "a cat", "--modifier_token: the tokenizer already has 'a'"),
        (("<|endoftext|>", "ktn"), "<|endoftext|>", "--modifier_token: the tokenizer already has '<|endoftext|>'"),
        (("<New1>", "ktn"), "a <New1>", "--modifier_token: the tokenizer reads '<New1>' as '<new1>'"),
        (("<new1>", "ktnpll"), "a <new1>", "--initializer_token: 'ktnpll' is 3 tokens"),
        (("<new1>", "photo of"), "a <new1>", "--initializer_token: 'photo of' is 2 tokens"),
        (("<new1>", " "), "a <new1>", "--initializer_token: ' ' is 0 tokens"),
        (("<new1>", "ktn"), "a " * 15 + "<new1>", "is cut off at the model's 16 tokens"),
    ],
)
def test_tokens_that_the_tokenizer_refuses(pair, prompt, expected, tiny_model):
    tokenizer = load_tokenizer(ModelSource(str(tiny_model)))  # before transformers 5, CLIPTokenizer reads otherwise
    (line,) = token_problems(tokenizer, [pair], [[prompt]])
    assert expected in line


# Weights files

KEY = "mid.attn2.processor.to_k_custom_diffusion.weight"


@pytest.mark.parametrize(
    "content",
    [None, 3, [torch.zeros(2)], {}, {1: torch.zeros(2)}, {KEY: 3}, {KEY: [1]}, {KEY: torch.tensor(1.0)}, {KEY: {}},
     {"mid.processor": {}}, {KEY: {"a": torch.zeros(2)}}],
    ids=repr,
)  # fmt: skip
def test_weights_files_of_other_things(content, tmp_path):
    torch.save(content, tmp_path / f"{WEIGHTS_NAME}.bin")
    with pytest.raises(ValueError, match=f"'{tmp_path}/{WEIGHTS_NAME}.bin'") as error:
        read_weights(tmp_path)
    reasons = ("is not a dictionary of tensors", "is no key of Custom Diffusion", "it has no Custom Diffusion weights")
    assert str(error.value).endswith(reasons) or reasons[1] in str(error.value)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_weights_files_cut_anywhere(suffix, tmp_path):
    path = tmp_path / f"{WEIGHTS_NAME}.{suffix}"
    save = torch.save if suffix == "bin" else save_file
    save({KEY: torch.arange(8.0).reshape(2, 4)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged") as error:
            read_weights(tmp_path)
        assert "\n" not in str(error.value)
        assert "(None)" not in str(error.value)  # the library's own reason


# By the program itself


REAL = {
    "resolution": ({"resolution": 66}, "--resolution: 66 is not a multiple of 4; try 64"),
    "all at once": ({"resolution": 66, "cuda_graphs": True}, "--resolution: 66 is not a multiple of 4; try 64"),
    "too small": ({"resolution": 1}, "--resolution: 1 is not a multiple of 4; try 4"),
    "token": (
        {"modifier_token": "cat", "instance_prompt": "photo of a cat"},
        "--modifier_token: the tokenizer already has 'cat'",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), REAL.values(), ids=REAL)
def test_the_run_ends_before_it_writes(changes, expected, run_arguments, tmp_path):
    run = launch.run(launch.FORKED, run_arguments | changes | {"output_dir": tmp_path / "out"}, tmp_path / "log")
    assert run.status == 2, run.output
    assert any(line.startswith(expected) for line in run.messages)
    assert "Traceback" not in run.output
    assert "Loading weights" not in run.output
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_command_line_answers_at_once(run_arguments, tmp_path):
    wrong = run_arguments | {"output_dir": tmp_path / "out", "learning_rate": "nan", "instance_data_dir": "nowhere"}
    run = launch.run(launch.PLAIN, wrong, tmp_path / "log")
    assert run.status == 2
    assert run.output.splitlines() == [
        "train_custom_diffusion.py: error: --learning_rate: nan must be a finite number",
        "train_custom_diffusion.py: error: --instance_data_dir: folder 'nowhere' does not exist; put the photos of the "
        "concept there",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_only_the_first_process_of_a_machine_speaks(run_arguments, tmp_path):
    wrong = run_arguments | {"output_dir": tmp_path / "out", "learning_rate": "nan"}
    runs = launch.run_group(2, wrong, tmp_path / "log")
    assert [run.wait() for run in runs] == [2, 2]
    assert [len(run.messages) for run in runs] == [1, 0]


@pytest.mark.parametrize("key", ["instance_data_dir", "class_data_dir"])
def test_no_output_among_images_that_are_trained_on(run_arguments, tmp_path, key):
    """The next run would learn from curve.png."""
    make_pictures(tmp_path / "images", 2)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    wrong = run_arguments | {"real_prior": False, "num_class_images": 2, "output_dir": tmp_path / "link"}
    run = launch.run(launch.FORKED, wrong | {key: tmp_path / "images"}, tmp_path / "log")
    assert run.status == 2
    assert run.messages == [f"--output_dir: '{tmp_path / 'link'}' is the folder of --{key}; name another"]
    assert len(list((tmp_path / "images").iterdir())) == 2


def late_first_process(folder, delay):
    """The environment in which torchrun's first process does `delay`, Python code, before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import os, time\n\nif os.environ.get('LOCAL_RANK') == '0':\n{delay}")
    return {"PYTHONPATH": f"{launch.ROOT}:{folder}"}


def test_a_first_process_that_comes_late_still_speaks(run_arguments, tmp_path):
    """A launcher ends the others as soon as one has ended, which must not be before the reason is told."""
    wrong = run_arguments | {"output_dir": tmp_path / "out", "learning_rate": "nan"}
    late = late_first_process(tmp_path / "packages", "    time.sleep(3)")
    run = launch.run(launch.torchrun(2), wrong, tmp_path / "log", late)
    assert run.status == 1  # the launcher's own
    assert run.messages == ["--learning_rate: nan must be a finite number"]


def test_a_first_process_that_comes_late_still_tells_why_the_run_stopped(run_arguments, tmp_path):
    diverging = run_arguments | {"output_dir": tmp_path / "out", "learning_rate": 1e30, "max_train_steps": 4}
    slow_print = (
        "    import tqdm\n"
        "    write = tqdm.tqdm.write\n"
        "    tqdm.tqdm.write = lambda *args, **kwargs: (time.sleep(2), write(*args, **kwargs))\n"
    )
    late = late_first_process(tmp_path / "packages", slow_print)
    run = launch.run(launch.torchrun(2), diverging, tmp_path / "log", late)
    (message,) = run.messages
    assert "is nan at step" in message


def test_a_process_that_alone_has_a_problem_tells_it(run_arguments, tmp_path):
    (tmp_path / "packages").mkdir()
    only_the_second = "import os\nif os.environ.get('LOCAL_RANK') == '1': os.environ['ACCELERATE_USE_FSDP'] = 'true'"
    (tmp_path / "packages/sitecustomize.py").write_text(only_the_second)
    environment = {"PYTHONPATH": f"{launch.ROOT}:{tmp_path / 'packages'}"}
    arguments = run_arguments | {"output_dir": tmp_path / "out"}
    (message,) = launch.run(launch.torchrun(2), arguments, tmp_path / "log", environment).messages
    assert message.startswith("accelerate config: FSDP ")
