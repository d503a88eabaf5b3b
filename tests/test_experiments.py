"""The trainings that the experiments share: made once, told apart, and summed up as the tables have them."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT
from PIL import Image
from tiny import make_clip, make_dino

sys.path.insert(0, str(ROOT / "experiments"))

import judge_and_metrics
import leakage
import merging
import reference
import runs
import small_clip
import stopping
import variants
import world
from judge import generate, see

from custom_diffusion.files import list_checkpoints
from custom_diffusion.model.loading import base_tensors, empty_unet, load_text
from custom_diffusion.model.source import ModelSource
from custom_diffusion.model.text_features import add_tokens, text_features
from custom_diffusion.training.augmentation import Augmentation
from custom_diffusion.weights.format import read_weights


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def weights(work_dir, tiny_model):
    """Of a run with a checkpoint at every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CHECKPOINTING_STEPS", 1)
        return runs.trained(work_dir, "circle", seed=3, steps=2, model=tiny_model)


def test_a_run_is_trained_into_its_place(work_dir, weights):
    assert weights == work_dir / "circle" / "seed-3" / "weights"
    assert list(read_weights(weights).tokens) == ["<new1>"]
    assert len(list((work_dir / "circle" / "photos").iterdir())) == 5
    assert [path.name for path in list_checkpoints(weights)] == ["checkpoint-1", "checkpoint-2"]


def test_both_concepts_are_trained_in_one_run(work_dir, tiny_model):
    weights = runs.trained(work_dir, runs.JOINT, seed=3, steps=2, model=tiny_model)
    assert weights == work_dir / "joint" / "seed-3" / "weights"
    assert list(read_weights(weights).tokens) == ["<new1>", "<new2>"]


def test_described_photos_each_have_their_prompt(work_dir):
    flag, file, words, tokens = runs.described_flags(work_dir, runs.JOINT)
    assert (flag, words, tokens) == ("--concepts_list", "--modifier_token", "<new1>+<new2>")
    entries = json.loads(Path(file).read_text())
    shown = {entry["instance_prompt"]: list(Path(entry["instance_data_dir"]).iterdir()) for entry in entries}
    assert len(shown) == 10
    for prompt, photos in shown.items():
        assert len(photos) == 1
        seen = see(np.asarray(Image.open(photos[0])))
        assert f"{seen.shape} on a {seen.background} background" in prompt


CROPPED = Augmentation(flip=False, crop=(16, 0, 80, 64), scale=64, left=0, top=0, prefix="", padded=False)


@pytest.mark.parametrize(
    ("name", "function", "arguments", "before", "after"),
    [
        (
            "photos-as-whole", "photo_time_ids", (CROPPED, Image.new("RGB", (96, 64)), (96, 64), 64),
            [64, 96, 0, 16, 64, 64], [64, 64, 0, 0, 64, 64],
        ),
        (
            "border", "photo_mask", (CROPPED, 64, 4),
            [[[1] * 4] * 4], [[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]],
        ),
    ],
)  # fmt: skip
def test_a_variant_changes_its_one_thing(name, function, arguments, before, after, monkeypatch):
    monkeypatch.setattr(variants.samples, function, getattr(variants.samples, function))  # put back after the test
    assert getattr(variants.samples, function)(*arguments).tolist() == before
    variants.VARIANTS[name]()
    assert getattr(variants.samples, function)(*arguments).tolist() == after


def test_the_last_word_can_stay_as_it_was(monkeypatch):
    make = variants.ConceptModel.__init__
    monkeypatch.setattr(variants.ConceptModel, "__init__", make)  # put back after the test
    variants.VARIANTS["last-word-fixed"]()
    rows = [torch.ones(2, 3, requires_grad=True), torch.ones(2, 5, requires_grad=True)]
    text = torch.nn.Module()
    text.trained_rows = lambda: rows
    variants.ConceptModel(torch.nn.Module(), text)
    sum((row**2).sum() for row in rows).backward()
    assert [row.grad.tolist() for row in rows] == [[[2] * 3, [0] * 3], [[2] * 5, [0] * 5]]


def test_a_run_is_trained_once(work_dir, weights, tiny_model, monkeypatch):
    monkeypatch.setattr(runs, "run", None)  # would fail if called
    assert runs.trained(work_dir, "circle", seed=3, steps=2, threads=2, model=tiny_model) == weights


def test_a_run_that_broke_off_is_made_again(work_dir, weights, tiny_model, monkeypatch):
    note = weights.parent / "run.json"
    kept = note.read_text()
    note.unlink()
    commands = []
    monkeypatch.setattr(runs, "run", lambda *command, **_: commands.append(command))
    runs.trained(work_dir, "circle", seed=3, steps=2, model=tiny_model)
    assert len(commands) == 1
    assert json.loads(note.read_text()) == json.loads(kept)


@pytest.mark.parametrize(
    "other",
    [{"steps": 3}, {"flags": ["--noaug"]}, {"script": (runs.VARIANTS, "border")}],
    ids=lambda other: next(iter(other)),
)
def test_another_run_does_not_pass_for_it(work_dir, weights, tiny_model, other):
    with pytest.raises(SystemExit, match=f"another {next(iter(other))}"):
        runs.trained(work_dir, "circle", seed=3, **{"steps": 2, "model": tiny_model, **other})


def test_another_model_does_not_pass_for_it(work_dir, weights, tiny_v_model):
    with pytest.raises(SystemExit, match="another model"):
        runs.trained(work_dir, "circle", seed=3, steps=2, model=tiny_v_model)


def test_what_was_measured_is_kept(tmp_path):
    file = tmp_path / "deep" / "scores.json"
    assert runs.once(file, lambda: {"concept": 1.5}) == {"concept": 1.5}
    assert runs.once(file, lambda: {"concept": 2.5}) == {"concept": 1.5}


def test_means_have_their_standard_errors():
    assert runs.mean_and_error([1, 2, 3, 6]) == pytest.approx((3, math.sqrt(14 / 3 / 4)))
    assert runs.cell([1, 2, 3, 6]) == "3.0 ± 1.1"
    assert runs.cell([1, 2, 3, 6], "+") == "+3.0 ± 1.1"
    assert runs.cell([4]) == "4.0"
    rows = [{"concept": 1.0, "prior": 5.0}, {"concept": 3.0, "prior": 5.0}]
    assert runs.summary(rows)["concept"] == {"mean": 2.0, "standard error": 1.0, "values": [1.0, 3.0]}
    assert runs.table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_run_would_have_ended_where_its_curve_lies_still(tmp_path):
    losses = [0.5, 0.4, 0.3, *[0.2] * 8]

    def step_of(count):
        points = [{"step": 50 * i, "concept_loss": loss} for i, loss in enumerate(losses[:count])]
        (tmp_path / "curve.json").write_text(json.dumps({"learned": None, "points": points}))
        return stopping.stopping_step(tmp_path)

    assert step_of(len(losses)) == 400
    assert step_of(9) is None  # at its end anyway
    assert step_of(8) is None


def test_stopping_is_compared_run_by_run():
    scores = dict.fromkeys(stopping.SCORES, 50.0)
    found = [
        {"seed": 0, "steps": 400, "given": scores | {"concept": 70.0}, "taken": scores | {"concept": 66.0}},
        {"seed": 1, "steps": 600, "given": scores | {"concept": 60.0}, "taken": scores | {"concept": 58.0}},
    ]
    row = stopping.compare("circle", 1000, found)
    assert row["steps taken"]["mean"] == 500
    assert row["differences"]["concept"] == {"mean": -3.0, "standard error": 1.0}
    assert row["differences"]["prior"] == {"mean": 0.0, "standard error": 0.0}
    line = stopping.table_of([row]).splitlines()[2]
    assert line == "| circle | 500.0 ± 100.0 of 1000 | concept | 65.0 ± 5.0 | 62.0 ± 4.0 | -3.0 ± 1.0 |"


def test_beside_the_reference_every_choice_meets_every_other():
    choices = [
        (setting["concept"], "--noaug" in setting["flags"], "--freeze_model" in setting["flags"])
        for setting in reference.settings()
    ]
    assert len(choices) == len(set(choices)) == 8
    sides = [setting["sides"] for setting in reference.settings()]
    assert all({reference.OURS, reference.REFERENCE} <= set(side) for side in sides)


def test_beside_the_reference_the_last_line_is_of_all_settings():
    def row(concept, ours, theirs):
        sides = {reference.OURS: ours, reference.REFERENCE: theirs}
        return {
            "concept": concept,
            "flags": ["--noaug"],
            "sides": {
                side: runs.summary([dict.fromkeys(reference.SCORES, value) for value in values])
                for side, values in sides.items()
            },
        }

    lines = reference.table_of(
        [row("circle", [1.0, 3.0], [2.0, 2.0]), row("joint", [8.0, 9.0], [3.0, 2.0])]
    ).splitlines()
    assert lines[4].startswith("| ours less reference | +0.0 ± 1.0 |")
    assert lines[7].startswith("| ours less reference | +6.0 ± 1.0 |")
    assert lines[8].startswith("| ours less reference, mean of all settings | +3.0 ± 1.0 |")


def test_class_images_can_have_no_caption_but_the_class_word(tmp_path):
    _, file = runs.described_flags(leakage.captioned_with_the_class_word(tmp_path), leakage.CONCEPT)
    for entry in json.loads(Path(file).read_text()):
        folder = Path(entry["class_data_dir"])
        assert folder.is_relative_to(tmp_path)
        captions = (folder / "caption.txt").read_text().splitlines()
        assert set(captions) == {leakage.CONCEPT}
        assert len(captions) == len(list((folder / "images").iterdir()))


def test_changes_are_compared_with_the_recipe_run_by_run():
    def scores(*values):
        return runs.summary([dict.fromkeys(leakage.SCORES, value) for value in values])

    lines = leakage.table_of({leakage.RECIPE: scores(10.0, 20.0), "half the rate": scores(6.0, 18.0)}).splitlines()
    assert lines[2].startswith(f"| {leakage.RECIPE} | 15.0 ± 5.0 |")
    assert lines[3].startswith("| half the rate | 12.0 ± 6.0 |")
    assert lines[4].startswith("| less the recipe | -3.0 ± 1.0 |")


def test_the_authors_solution_is_exact_in_their_sentences_and_not_in_others():
    source, random = ModelSource(str(runs.MODEL)), torch.Generator().manual_seed(0)
    text = load_text(source, torch.device("cpu"))
    add_tokens(text, {word: torch.randn(sum(text.widths), generator=random) for word in runs.WORDS.values()})
    names = [name for name, _ in empty_unet(source).named_parameters() if "mid_block" in name and "attn2.to_k" in name]
    base = base_tensors(source, names)
    parts = [{n: v + 0.1 * torch.randn(v.shape, generator=random) for n, v in base.items()} for _ in runs.WORDS]
    specs = merging.class_specs("circle") + merging.class_specs("square")
    merged = merging.authors_solution(text, base, parts, [spec.caption() for spec in specs])
    for part, (name, word) in zip(parts, runs.WORDS.items()):
        for sentence, exact in (("{}", True), ("a photo of {}", True), ("photo of a {} on a navy background", False)):
            ids, features = text_features(text, [sentence.format(f"{word} {name}")])
            start = ids[0].tolist().index(text.tokenizers[0].convert_tokens_to_ids(word))
            rows = features[0, start : start + 3].float()  # the word, its class, and the end token or what follows
            same = [torch.allclose(rows @ merged[n].T, rows @ part[n].T, atol=1e-3) for n in base]
            assert all(same) if exact else not any(same)
    told = merging.lost(text, base, parts, merged)
    assert 0 < told["lost, prompt"] < told["lost, background"]


def test_the_judge_and_the_metrics_score_the_same_weights(work_dir, weights, tiny_model, monkeypatch, tmp_path, capsys):
    base = {"concept": "circle", "prompt": "circle", "score": 1.0, "prior_class": 0.9}  # else measured, for minutes
    model = {"model": runs.baselines.fingerprint(tiny_model), "concepts": [base]}
    runs.write_json(runs.baselines.file_of(tiny_model), model)
    monkeypatch.setattr(judge_and_metrics, "CHECKPOINTS", (1,))
    monkeypatch.setitem(judge_and_metrics.DRAWING, "num_inference_steps", 2)
    monkeypatch.setattr(runs.concepts, "generate", functools.partial(generate, num_inference_steps=2))
    clip, dino = make_clip(tmp_path / "clip"), make_dino(tmp_path / "dino")
    argv = [
        "--work_dir",
        work_dir,
        "--model",
        tiny_model,
        "--docs",
        tmp_path,
        "--clip_model",
        clip,
        "--dino_model",
        dino,
    ]
    argv += ["--first_seed", 3, "--num_seeds", 1, "--steps", 2, "--num_images", 1]
    monkeypatch.setattr(sys, "argv", ["judge_and_metrics.py", *map(str, argv)])
    judge_and_metrics.main()
    found = json.loads((tmp_path / "judge_and_metrics.json").read_text())
    assert [row["steps"] for row in found["rows"]] == [0, 1, 2]
    folder = work_dir / "judge_and_metrics" / "seed-3"
    evaluated = json.loads((folder / "evaluate" / "results.json").read_text())["results"]
    judged = [folder / "base.json", weights.parent / "scores-1.json", weights.parent / "scores-2.json"]
    for row, metrics, file in zip(found["rows"], evaluated, judged):
        expected = metrics | json.loads(file.read_text()) | {"seed": 3}
        assert row == {key: expected[key] for key in row}
    assert len({row["clip_i"] for row in found["rows"]}) == 3
    scores = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert scores[:5] == ["| steps", "| ---", "| 0", "| 1", "| 2"]


def test_rank_correlations_are_taken_with_and_without_the_base_model():
    names = [*judge_and_metrics.JUDGE, *judge_and_metrics.METRICS]
    values = [(0, 9.0, 0.1), (1, 3.0, 0.7), (2, 5.0, 0.8)]  # steps, the judge's concept score, CLIP-I
    rows = [dict.fromkeys(names, 1.0) | {"steps": step, "concept": c, "clip_i": i} for step, c, i in values]
    assert judge_and_metrics.correlations(rows)["concept"]["clip_i"] == pytest.approx(-0.5, abs=1e-4)
    trained = judge_and_metrics.correlations(rows[1:])
    assert trained["concept"]["clip_i"] == pytest.approx(1, abs=1e-4)
    assert trained["concept"]["dino"] is None and trained["leakage"]["clip_i"] is None


def test_small_encoders_are_what_evaluate_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(small_clip, "BATCH_SIZE", 16)
    folders = small_clip.trained(tmp_path, clip_steps=2, vit_steps=2)
    monkeypatch.setattr(small_clip, "train", None)  # would fail if called
    assert small_clip.trained(tmp_path) == folders
    assert all((folder / "preprocessor_config.json").is_file() for folder in folders)
    scores = small_clip.check_clip(folders[0])
    assert scores["captions"] == len(world.held_out_specs())
    assert 0 <= scores["caption of a drawing"] <= scores["caption of a drawing, among five"] < 50
    assert 0 < small_clip.check_vit(folders[1], num_looks=20)["same look"] <= 100


def test_views_differ_but_not_in_what_they_show():
    thing = world.Thing("cross", 174.0, 28.0, "gray")
    torch.manual_seed(0)
    image = torch.from_numpy(world.draw(thing)).permute(2, 0, 1)[None].float() / 255
    views = small_clip.views(image.expand(8, -1, -1, -1), mean=(0, 0, 0), std=(1, 1, 1))
    assert len({view.mean().item() for view in views}) == 8
    for view in views:
        seen = see((255 * view).round().byte().permute(1, 2, 0).numpy())
        assert (seen.shape, seen.background) == ("cross", "gray")
        assert world.hue_distance(seen.hue, 174.0) < 4 and seen.edged.mean() > 0.9


def test_what_belongs_together_is_found_by_the_contrastive_loss():
    rows = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0])  # lengths do not matter
    logits = torch.eye(4) / 0.5
    by_hand = -torch.log_softmax(logits, dim=1).diagonal().mean()
    assert small_clip.contrastive_loss(rows, torch.eye(4), 0.5).item() == pytest.approx(by_hand.item())
    assert small_clip.contrastive_loss(rows, torch.eye(4).roll(1, 0), 0.5) > by_hand + 1
