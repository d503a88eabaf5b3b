"""Evaluating trained folders: drawing and going on, results, the page, the benchmark, and what cannot work."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from fake_concept import make_concept, open_pipeline, run_tool
from launch import ROOT
from PIL import Image
from tiny import make_class_folder, make_clip, make_dino, make_model, make_pictures

from custom_diffusion import evaluate, load_custom_diffusion, read_weights
from custom_diffusion.cli.training_flags import build_parser
from custom_diffusion.errors import InputError
from custom_diffusion.evaluation import run
from custom_diffusion.evaluation.page import _plot
from custom_diffusion.evaluation.prompts import PROMPT_SETS, class_prompt_of, concept_of, read_prompts, without_tokens
from custom_diffusion.files import CONFIG_NAME

STEPS = 2


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """Two checkpoints of a concept, photos, class images, prompts, CLIP and DINO, all small."""
    folder = tmp_path_factory.mktemp("world")
    for steps, seed in ((100, 1), (200, 2)):
        make_concept(folder / f"checkpoint-{steps}", tiny_model, seed=seed)
        settings = folder / f"checkpoint-{steps}" / CONFIG_NAME
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"steps": steps}))
    make_pictures(folder / "photos", 3)
    make_class_folder(folder / "class", 5)
    (folder / "prompts.txt").write_text("photo of a {}\n\n a {} in the bucket & pot \n")
    make_clip(folder / "clip")
    make_dino(folder / "dino")
    return folder


def flags(world, output, *, num_images=2, steps=STEPS):
    return [
        "--photos", world / "photos", "--prompts", world / "prompts.txt", "--num_images", num_images, "--output", output,
        "--clip_model", world / "clip", "--dino_model", world / "dino", "--num_inference_steps", steps, "--resolution", 64,
    ]  # fmt: skip


def checkpoints(world):
    return [world / "checkpoint-100", world / "checkpoint-200"]


def drawn(output):
    """Every drawn image's modification time and bytes."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("images/*/*.png")}


def error_of(capsys, *argv):
    """The one line with which evaluating ends."""
    with pytest.raises(SystemExit) as ended:
        run_tool("evaluate", *argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0].removeprefix("custom-diffusion evaluate: error: ")


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    """A whole evaluation, killed in the middle and gone on with: (output folder, what was drawn at the kill, log)."""
    output = tmp_path_factory.mktemp("evaluated") / "scores"
    argv = [*checkpoints(world), "--with_base", "--class_images", world / "class", *flags(world, output)]
    command = [sys.executable, "-m", "custom_diffusion", "evaluate", *map(str, argv)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(output.rglob("*.png"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (output / "images" / "base" / ".000-1.png.01234567.custom-diffusion-part").write_bytes(b"cut short")
    before = drawn(output)
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    # Nothing but progress: above all no word of torchvision, and no list of weights that were left out on purpose.
    assert not re.sub(r"(Drawing|Loading)\b[^\r\n]*", "", finished.stderr).strip()
    return output, before, finished.stdout


def test_what_was_stopped_is_gone_on_with(evaluated):
    output, before, _ = evaluated
    after = drawn(output)
    assert 3 <= len(before) < len(after) == 3 * (4 + 4)
    assert {path: after[path] for path in before} == before
    assert not list(output.rglob(".*"))


def test_results_are_the_same_in_json_csv_and_on_the_terminal(evaluated, world):
    output, _, log = evaluated
    written = json.loads((output / "results.json").read_text())
    results = written["results"]
    assert [(row["weights"], row["steps"], row["concept"], row["num_images"]) for row in results] == [
        ("base model", 0, "cat", 4),
        (str(world / "checkpoint-100"), 100, "<new1> cat", 4),
        (str(world / "checkpoint-200"), 200, "<new1> cat", 4),
    ]
    settings = written["settings"]
    assert (settings["num_photos"], settings["num_class_images"], settings["scheduler"]) == (3, 5, "DDPM")
    with (output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = log.splitlines()
    assert lines[0].split() == ["weights", "steps", "CLIP-T", "CLIP-I", "DINO", "KID-CLIP"]
    for result, row, line in zip(results, rows, lines[1:]):
        assert result["num_class_images"] == 4
        for score in ("clip_t", "clip_t_cosine", "clip_i", "dino"):
            images = [image[score] for image in result["images"]]
            assert float(row[score]) == result[score] == pytest.approx(np.mean(images))
            of_prompts = [np.mean(images[:2]), np.mean(images[2:])]
            error = np.std(of_prompts, ddof=1) / 2**0.5
            assert float(row[f"{score}_error"]) == pytest.approx(error)
            assert score == "clip_t_cosine" or f"{result[score]:.3f} ± {error:.3f}" in line
        assert float(row["kid_clip"]) == result["kid_clip"]
        assert f"{result['kid_clip']:.2f} ± {result['kid_clip_deviation']:.2f}" in line
    assert lines[-1] == str(output / "index.html")


def test_texts_know_nothing_of_the_modifier_token(evaluated):
    results = json.loads((evaluated[0] / "results.json").read_text())["results"]
    for result in results:
        texts = [image["text"] for image in result["images"]]
        assert texts == ["photo of a cat"] * 2 + ["a cat in the bucket & pot"] * 2
    assert [image["prompt"] for image in results[1]["images"]][2] == "a <new1> cat in the bucket & pot"


@pytest.mark.parametrize("place", [0, 2])
def test_images_are_those_of_ddpm_and_of_noise_that_all_weights_share(evaluated, world, tiny_model, place):
    output = evaluated[0]
    result = json.loads((output / "results.json").read_text())["results"][place]
    pipe = open_pipeline(tiny_model)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if place:
        load_custom_diffusion(pipe, world / "checkpoint-200")

    def expected(prompt, seed):
        random = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": STEPS, "guidance_scale": 6.0, "height": 64, "width": 64}
        return np.asarray(pipe(prompt, generator=random, **options).images[0])

    for image, seed in zip(result["images"], (42, 43, 1042, 1043)):
        assert np.array_equal(np.asarray(Image.open(output / image["file"])), expected(image["prompt"], seed))
    class_image = (output / result["images"][0]["file"]).with_name("class-003-0.png")
    assert np.array_equal(np.asarray(Image.open(class_image)), expected("photo of a cat 3", 3042))


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.marks, self.text = [], Counter(), Counter(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        self.sources += [attributes[name] for name in ("src", "href", "data", "srcset") if name in attributes]
        if tag == "figure" and "class" in attributes:
            self.marks[attributes["class"]] += 1

    def handle_data(self, data):
        self.text += data


def test_the_page_opens_without_a_network(evaluated, world):
    output = evaluated[0]
    text = (output / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    results = json.loads((output / "results.json").read_text())["results"]
    assert (
        page.sources
        == [  # prompts down, models across
            image["file"] for start in (0, 2) for result in results for image in result["images"][start : start + 2]
        ]
    )
    assert all((output / unquote(source)).is_file() for source in page.sources)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert page.tags["svg"] == page.tags["polyline"] == 4 and page.tags["circle"] == 4 * 3
    assert page.tags["script"] == page.tags["link"] == page.tags["new1"] == 0
    assert page.marks == {"best": 2, "worst": 2}
    assert "photo of a {}" in page.text and "a {} in the bucket & pot" in page.text
    assert page.text.count("(best)") == page.text.count("(worst)") == 4


def test_the_best_image_of_a_prompt_is_marked(evaluated):
    output = evaluated[0]
    images = [
        image for result in json.loads((output / "results.json").read_text())["results"] for image in result["images"]
    ]
    text = (output / "index.html").read_text(encoding="utf-8")
    for template in ("photo of a {}", "a {} in the bucket & pot"):
        those = sorted(
            (i for i in images if i["template"] == template), key=lambda i: i["clip_t"] + i["clip_i"] + i["dino"]
        )
        assert f'<figure class="best"><img src="{those[-1]["file"]}"' in text
        assert f'<figure class="worst"><img src="{those[0]["file"]}"' in text


def test_the_plots_lead_from_checkpoint_to_checkpoint():
    """The folder of a run has the weights of its last checkpoint; of two runs nothing leads from one to the other."""

    def line(*rows):
        rows = [{"weights": name, "steps": steps, "dino": score} for name, steps, score in rows]
        return re.search('<polyline points="([^"]*)"', _plot(rows, "dino")).group(1)

    run = [("a/checkpoint-100", 100, 0.2), ("a/checkpoint-200", 200, 0.4)]
    assert len(line(*run).split()) == 2
    assert line(("a", 200, 0.4), *run) == line(*run)
    assert not line(("b", 200, 0.3), *run)
    assert not line(("merged", None, 0.3), *run)


def test_nothing_is_drawn_twice_and_more_is_added(evaluated, world, tmp_path, capsys):
    output = shutil.copytree(evaluated[0], tmp_path / "scores")
    before = drawn(output)
    (output / "images" / "base" / "001-1.png").unlink()  # fewer than were asked for
    more = ["--with_base", *flags(world, output, num_images=3)]
    renamed = shutil.copytree(world / "checkpoint-200", tmp_path / "elsewhere")
    run_tool("evaluate", renamed, world / "checkpoint-200", *more)
    after = drawn(output)
    assert {path: after[path] for path in before.keys() - {output / "images/base/001-1.png"}}.items() <= before.items()
    assert after[output / "images/base/001-1.png"][1] == before[output / "images/base/001-1.png"][1]
    assert len(after) == len(before) + 2 * 2
    assert "KID-CLIP" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--guidance_scale", 3], "was drawn with guidance_scale 6.0, not 3.0"),
        (["--seed", 7], "was drawn with seed 42, not 7"),
        (["--concept", "<new1> pot"], "was drawn with prompt 'photo of a <new1> cat', not 'photo of a <new1> pot'"),
    ],
)
def test_changed_settings_are_noticed_and_nothing_is_lost(evaluated, world, capsys, changed, says):
    output = evaluated[0]
    before, results = drawn(output), (output / "results.json").read_bytes()
    line = error_of(capsys, world / "checkpoint-100", *flags(world, output), *changed)
    assert line.startswith(f"--output: '{output}/images/") and f"{says}; name another folder" in line
    assert drawn(output) == before and (output / "results.json").read_bytes() == results


def test_an_image_of_somebody_else_is_left_alone(evaluated, world, tmp_path, capsys):
    output = shutil.copytree(evaluated[0], tmp_path / "scores")
    image = output / "images/base/000-0.png"
    Image.new("RGB", (64, 64)).save(image)
    argv = ["--model", json.loads((output / "results.json").read_text())["settings"]["model"], "--concept", "cat"]
    assert "was not drawn by this tool" in error_of(capsys, *argv, *flags(world, output))
    whole = (evaluated[0] / "images/base/000-0.png").read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its note, at the beginning, is there
    assert "remove it, and it is drawn again" in error_of(capsys, *argv, *flags(world, output))
    image.write_bytes(b"no image")
    assert "cannot be read" in (line := error_of(capsys, *argv, *flags(world, output))) and str(image) in line


def test_files_of_somebody_else_are_left_alone(world, tmp_path, capsys):
    for name, content in (
        ("index.html", "<!doctype html>\n<html lang='en'><p>mine"),
        ("results.csv", "weights;a\n"),
        ("results.json", "[]"),
    ):
        output = tmp_path / name
        output.mkdir()
        (output / name).write_text(content)
        line = error_of(capsys, world / "checkpoint-100", *flags(world, output))
        assert line == f"--output: '{output / name}' was not written by this tool; name another folder"
        assert [path.read_text() for path in output.iterdir()] == [content]


def test_the_model_may_be_spelled_otherwise(evaluated, world, tiny_model, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(evaluated[0], tmp_path / "scores")
    before = drawn(output)
    monkeypatch.chdir(tiny_model.parent)
    run_tool("evaluate", world / "checkpoint-100", "--model", tiny_model.name, *flags(world, output))
    assert drawn(output) == before
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert (settings["model"], settings["photos"]) == (str(tiny_model), str(world / "photos"))


# A concept that is nothing but its word


@pytest.fixture
def style(world, tiny_model, tmp_path):
    """Weights of a style, whose prompt ends in the new word."""
    folder = tmp_path / "style"
    make_concept(folder, tiny_model)
    settings = folder / CONFIG_NAME
    concept = {"instance_prompt": "painting in the style of <new1>", "class_prompt": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"concepts": [concept]}))
    return folder


def test_a_name_without_the_new_word_is_what_the_base_model_calls_it(style, world, tmp_path, capsys):
    output = tmp_path / "scores"
    make_pictures(tmp_path / "class", 2)
    argv = [style, "--with_base", *flags(world, output), "--class_images", tmp_path / "class"]
    assert error_of(capsys, *argv).startswith("--concept: say what the base model calls")
    assert error_of(capsys, style, *argv[2:]).startswith("--concept: say what the base model calls")  # its class images
    run_tool("evaluate", *argv, "--concept", "painting")
    base, trained = json.loads((output / "results.json").read_text())["results"]
    assert (base["concept"], trained["concept"]) == ("painting", "<new1>")
    notes = [
        json.loads(Image.open(path).info["custom-diffusion"])["prompt"] for path in output.rglob("class-000-0.png")
    ]
    assert notes == ["photo of a painting"] * 2


def test_the_class_prompt_is_what_the_base_model_calls_it(style, world, tmp_path):
    settings = style / CONFIG_NAME
    settings.write_text(settings.read_text().replace('"class_prompt": null', '"class_prompt": "art"'))
    base, trained = evaluate(
        style, output=tmp_path / "scores", photos=world / "photos", prompts=world / "prompts.txt", with_base=True,
        clip_model=str(world / "clip"), dino_model=str(world / "dino"), num_inference_steps=STEPS, num_images=1, resolution=64,
    )  # fmt: skip
    assert (base["concept"], trained["concept"]) == ("art", "<new1>")


# As a function


def test_the_base_model_alone_and_weights_already_read(evaluated, world, tiny_model, tmp_path):
    output = shutil.copytree(evaluated[0], tmp_path / "scores")
    options = {"photos": world / "photos", "prompts": world / "prompts.txt", "num_images": 2, "output": output,
               "clip_model": str(world / "clip"), "dino_model": str(world / "dino"), "num_inference_steps": STEPS,
               "resolution": 64}  # fmt: skip
    expected = json.loads((output / "results.json").read_text())["results"]
    [base] = evaluate(model=str(tiny_model), concept="cat", **options)
    assert base["clip_i"] == pytest.approx(expected[0]["clip_i"], abs=1e-6)
    [row] = evaluate(read_weights(world / "checkpoint-100"), **options)
    assert row["weights"] == "weights 1" and row["dino"] == pytest.approx(expected[1]["dino"], abs=1e-6)


# What cannot work: one line, before anything is drawn


def test_no_network_for_clip_is_told_before_anything_is_drawn(world, tmp_path, capsys):
    for name, default in (("clip_model", "openai/clip-vit-base-patch32"), ("dino_model", "facebook/dino-vits16")):
        argv = flags(world, tmp_path / "scores")
        argv[argv.index(f"--{name}") + 1] = default
        line = error_of(capsys, world / "checkpoint-100", *argv)
        assert line.startswith(f"--{name}: '{default}' cannot be loaded") and "name the folder of one" in line
        assert not (tmp_path / "scores").exists()


@pytest.fixture
def bad_inputs(world, tiny_model, tmp_path):
    """Name -> (arguments that come before and after the usual ones, what is said)."""
    (tmp_path / "empty").mkdir()
    make_pictures(tmp_path / "one", 1)
    (tmp_path / "text.txt").write_text("photo of a {}\nphoto of a cat\n")
    (tmp_path / "nothing.txt").write_text("\n")
    shutil.copytree(world / "photos", tmp_path / "torn")
    (tmp_path / "torn/1.jpg").write_bytes((tmp_path / "torn/1.jpg").read_bytes()[:300])
    make_concept(tmp_path / "other", tiny_model, "<new2>")
    settings = tmp_path / "other" / CONFIG_NAME
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model": "me/other"}))
    wide = make_model(tmp_path / "wide", width=64)
    trained = world / "checkpoint-100"
    return {
        "photos gone": ([trained, "--photos", tmp_path / "gone"], "--photos: folder .*gone' cannot be read"),
        "no photos": ([trained, "--photos", tmp_path / "empty"], "--photos: no image in folder"),
        "torn photo": ([trained, "--photos", tmp_path / "torn"], "--photos: cannot read image '.*1.jpg'"),
        "one class image": ([trained, "--class_images", tmp_path / "one"], "--class_images: one image in folder"),
        "prompt": ([trained, "--prompts", tmp_path / "text.txt"], r"--prompts: line 2 of .*, 'photo of a cat', has no \{\}"),
        "no prompt": ([trained, "--prompts", tmp_path / "nothing.txt"], "--prompts: .* is empty"),
        "prompts gone": ([trained, "--prompts", "thing"], "--prompts: 'thing' cannot be read .*things"),
        "other base": ([trained, tmp_path / "other"], "weights: '.*100' was trained on '.*', '.*other' on 'me/other'"),
        "does not fit": ([trained, "--model", wide], "weights: '.*checkpoint-100': .* does not fit"),
        "unknown word": ([trained, "--concept", "<new9> cat"], "--concept: '<new9> cat' has <new9>"),
        "base without a name": (["--model", tiny_model], "--concept: say what the base model calls"),
        "nothing": ([], "weights: give trained weights, or a --model"),
        "images": ([trained, "--num_images", 0], "--num_images: 0 must be 1 to 1000"),
        "steps": ([trained, "--num_inference_steps", 5000], "--num_inference_steps: 5000 is more than the model's 1000"),
        "seed": ([trained, "--seed", 2**64], "--seed: 18446744073709551616 must be 0 to 9223372036854775807"),
        "guidance": ([trained, "--guidance_scale", "nan"], "--guidance_scale: nan must be a finite number"),
        "resolution": ([trained, "--resolution", 100], "--resolution: 100 is not a multiple of 8; try 96"),
        "clip": ([trained, "--clip_model", "./gone"], "--clip_model: folder './gone' does not exist"),
        "data": ([trained, "--data", "x"], "--data: needs --dataset"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["torn photo", "steps"])
def test_what_needs_no_model_is_told_before_one_is_loaded(bad_inputs, world, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(run, "load_clip", None)  # would fail if called
    argv, expected = bad_inputs[name]
    assert re.match(expected, error_of(capsys, *flags(world, tmp_path / "scores"), *argv))


def test_what_cannot_work_is_told_in_one_line_before_anything_is_drawn(bad_inputs, world, tmp_path, capsys):
    for name, (argv, expected) in bad_inputs.items():
        line = error_of(capsys, *flags(world, tmp_path / "scores"), *argv)
        assert re.match(expected, line), f"{name}: {line}"
        assert not (tmp_path / "scores").exists(), name


# Prompts


def test_the_shipped_prompts():
    assert PROMPT_SETS == ("faces", "styles", "things")
    for name in PROMPT_SETS:
        prompts = read_prompts(name)
        assert len(set(prompts)) == 20 and all(prompt.count("{}") == 1 for prompt in prompts)


def test_what_a_concept_is_called():
    def called(*prompts, tokens=("<new1>",)):
        return concept_of({"concepts": [{"instance_prompt": p} for p in prompts]}, list(tokens), "cat")

    assert called("photo of a <new1> cat") == "<new1> cat"
    assert called("photo of a <new2> <new1> cat", tokens=["<new1>", "<new2>"]) == "<new2> <new1> cat"
    assert called("a painting in the style of <new1> art") == "<new1> art"
    two = [
        {"instance_prompt": "in the style of <new1>", "class_prompt": "art"},
        {"instance_prompt": "<new2>", "class_prompt": "film"},
    ]
    words = ["<new1>", "<new2>"]
    assert [class_prompt_of({"concepts": two}, called, words) for called in (*words, "<new2> and <new1>", "cat")] == [
        "art",
        "film",
        "art",
        "",
    ]
    with pytest.raises(InputError, match="--concept: 'cat' has several concepts; say which"):
        called("a <new1> cat", "a <new1> pot")
    with pytest.raises(InputError, match="--concept: 'cat' does not say what it is called"):
        called()
    assert without_tokens("a <new1> cat, <new2>", ["<new1>", "<new2>"]) == "a cat,"


# The benchmark


@pytest.fixture
def dataset(tmp_path):
    """A folder in the layout of the authors', with two concepts."""
    folder = tmp_path / "customconcept101"
    entries = []
    for number, name in enumerate(("pet_cat", "things_pot")):
        make_pictures(folder / "benchmark_dataset" / name, 2, seed=number)
        word = name.split("_")[1]
        entries.append({"instance_prompt": f"photo of a <new1> {word}", "class_prompt": word, "prompt_filename": "prompts/a.txt",
                        "instance_data_dir": f"./benchmark_dataset/{name}", "class_data_dir": f"./regularization/{name}"})  # fmt: skip
    (folder / "prompts").mkdir()
    (folder / "prompts" / "a.txt").write_text("photo of a {}.\nA {} in the bucket \n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder


def benchmark_flags(world, dataset, output, model):
    return ["--dataset", "customconcept101", "--data", dataset, "--output", output, "--model", model, "--num_images", 1,
            "--clip_model", world / "clip", "--dino_model", world / "dino", "--num_inference_steps", STEPS,
            "--resolution", 64]  # fmt: skip


def test_the_benchmark_prints_commands_trains_scores_and_compares(world, dataset, tiny_model, tmp_path, capfd):
    output = tmp_path / "out"
    argv = benchmark_flags(world, dataset, output, tiny_model)
    run_tool("evaluate", *argv)
    commands = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    assert len(commands) == 2 and not output.exists()
    for command, name in zip(commands, ("pet_cat", "things_pot")):
        script = next(word for word in command if word.endswith("train_custom_diffusion.py"))
        args = build_parser().parse_args(command[command.index(script) + 1 :])
        assert args.instance_data_dir == str(dataset / "benchmark_dataset" / name) and args.modifier_token == "<new1>"
        assert (args.max_train_steps, args.num_class_images, args.with_prior_preservation) == (500, 200, True)

    make_concept(output / "pet_cat" / "weights", tiny_model)
    train = (
        "--max_train_steps=1 --num_class_images=1 --dataloader_num_workers=0 --train_batch_size=1 --learning_rate=1e-6"
    )
    run_tool("evaluate", *argv, "--train", train)
    lines = capfd.readouterr().out.splitlines()
    assert (output / "things_pot" / "weights" / CONFIG_NAME).is_file()
    assert any("here, 2 of 2 concepts" in line for line in lines)
    assert any(re.fullmatch(r"Custom Diffusion \(published\)\s+0\.7583\s+0\.7456\s+0\.5335", line) for line in lines)
    results = json.loads((output / "results.json").read_text())["results"]
    assert [row["concept"] for row in results] == ["<new1> cat", "<new1> pot"]
    mean = np.mean([row["clip_i"] for row in results])
    assert re.search(rf"here, 2 of 2 concepts\s+\S+ ± \S+\s+{mean:.4f} ± ", "\n".join(lines))
    before = drawn(output)
    run_tool("evaluate", *argv, "--train")
    assert drawn(output) == before and len(before) == 4


def test_a_dataset_that_cannot_be_used_is_told_in_one_line(world, dataset, tiny_model, tmp_path, capsys):
    argv = benchmark_flags(world, dataset, tmp_path / "out", tiny_model)
    assert error_of(capsys, "cat", *argv).startswith("weights: --dataset brings its own")
    assert error_of(capsys, *argv, "--train", "'--hflip").startswith('--train: "\'--hflip" cannot be split')
    clip = argv.index("--clip_model") + 1
    assert "--clip_model: 'no/clip'" in error_of(capsys, *argv[:clip], "no/clip", *argv[clip + 1 :], "--train")
    entries = (dataset / "dataset.json").read_text()
    (dataset / "dataset.json").write_text("[{}]")
    with pytest.raises(InputError, match="--data: is missing"):
        evaluate(dataset="customconcept101", output=tmp_path / "out")
    with pytest.raises(InputError, match="--photos: is missing"):
        evaluate(world / "checkpoint-100", output=tmp_path / "out")
    assert re.match("--data: '.*dataset.json' must be a list of concepts", error_of(capsys, *argv))
    (dataset / "dataset.json").write_text(entries)
    make_pictures(dataset / "other" / "pet_cat", 1)
    (dataset / "dataset.json").write_text(entries.replace("benchmark_dataset/things_pot", "other/pet_cat"))
    assert error_of(capsys, *argv).startswith("--data: two concepts are called 'pet_cat'")
    (dataset / "dataset.json").write_text(entries)
    shutil.rmtree(dataset / "benchmark_dataset" / "pet_cat")
    assert "unpack the authors' benchmark_dataset.zip" in error_of(capsys, *argv)
