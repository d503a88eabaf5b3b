# ruff: noqa: E402
"""The embedded model follows its captions, and Custom Diffusion teaches it a thing that it has no words for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

import baselines
import concept
import judge
import world

# Of 100, over the best description in words that the model knows: a run of half the steps has so much and more.
CONCEPT_MARGIN = 15


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_demo(output, *flags):
    command = [sys.executable, str(DEMO / "demo.py"), "--output", str(output), *flags]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((output / "scores.json").read_text())


@pytest.fixture(scope="module")
def with_prior(tmp_path_factory):
    """Scores before and after, and the folder of a demo of half the steps: enough to tell, in half the time."""
    output = tmp_path_factory.mktemp("demo")
    return run_demo(output, "--steps", "500"), output


@pytest.fixture(scope="module")
def without_prior(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("without_prior"), "--steps", "300", "--without_prior")


def test_embedded_model_is_small():
    assert sum(path.stat().st_size for path in (DEMO / "model").rglob("*") if path.is_file()) <= 12e6


def test_every_caption_word_is_one_token(pipeline):
    for word in world.WORDS:
        assert len(pipeline.tokenizer.tokenize(word)) == 1, word


def test_judge_is_right_about_true_pictures():
    rng = np.random.default_rng(7)
    for _ in range(300):
        thing, spec = world.random_sample(rng)
        seen = judge.see(world.draw(thing))
        assert seen.background == thing.background
        assert world.hue_distance(seen.hue, thing.hue) < 4
        assert seen.shape == thing.shape
        assert all(judge.check_caption(seen, spec).values())


def test_photos_show_the_concept():
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((DEMO / "photos").iterdir())]
    assert len(photos) == 5
    assert min(judge.likeness(judge.see(photo), concept.LOOK) for photo in photos) > 0.95


def test_baselines_are_of_the_embedded_model():
    """Else the demo would measure them anew, which takes minutes: `python demo/baselines.py`."""
    model = DEMO / "model"
    assert json.loads(baselines.file_of(model).read_text())["model"] == baselines.fingerprint(model)
    bases = baselines.read(model)
    assert bases.keys() == concept.LOOKS.keys()
    for name, base in bases.items():
        assert base.prompt in baselines.descriptions(name)
        assert base.prior_class > concept.collapsed_share(name) + 0.3


def test_embedded_model_follows_captions_it_never_saw(pipeline):
    specs = world.held_out_specs()[::5]
    right = judge.score_captions(pipeline, specs, seed=1)
    assert right["background"] >= 95
    assert right["color"] >= 95
    assert right["shape"] >= 85


def test_concept_is_learned_and_the_rest_is_kept(with_prior):
    scores, output = with_prior
    before, prompted, after = scores["before"], scores["prompted"], scores["after"]
    assert after["concept"] >= max(before["concept"], prompted["concept"]) + CONCEPT_MARGIN
    assert after["concept"] >= after["leakage"] + 10
    assert after["prior"] >= before["prior"] - 3
    assert after["prior_class"] >= 75
    assert Image.open(output / "before_after.png").width >= 1000


def test_without_prior_preservation_the_rest_suffers(with_prior, without_prior):
    assert without_prior["after"]["prior"] < with_prior[0]["after"]["prior"]
    assert without_prior["after"]["prior_class"] < with_prior[0]["after"]["prior_class"] - 10
    assert without_prior["after"]["leakage"] > with_prior[0]["after"]["leakage"]


@pytest.mark.slow
def test_merging_and_compressing_keep_the_concepts(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/merge_and_compress.py"), "--num_seeds", "3"]
    subprocess.run([*command, "--work_dir", str(tmp_path), "--docs", str(tmp_path)], check=True, cwd=ROOT)
    results = json.loads((tmp_path / "merge_and_compress.json").read_text())
    merge = {label: {key: one["mean"] for key, one in row.items()} for label, row in results["merge"].items()}
    for name in concept.LOOKS:
        assert merge["apart"][name] > merge["best description"][name] + CONCEPT_MARGIN
        assert merge["merged"][name] >= 0.9 * merge["apart"][name]
        assert merge["merged"][name] > merge["plain average"][name]
    *smaller, full = [{key: one["mean"] for key, one in row.items()} for row in results["compress"].values()]
    fifth = max((row for row in smaller if row["bytes"] <= full["bytes"] / 5), key=lambda row: row["bytes"])
    assert abs(fifth["score"] - full["score"]) <= 0.03 * full["score"]
