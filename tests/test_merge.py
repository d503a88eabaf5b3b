"""Merging: the paper's equations on random data, then whole folders."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool
from tiny import WORDS

from custom_diffusion import load_custom_diffusion, merge
from custom_diffusion.errors import InputError
from custom_diffusion.model.loading import load_text_encoder, load_tokenizer
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.merge import (
    MAX_CHANGE,
    MAX_CONDITIONING,
    SENTENCES,
    common_config,
    make_constraints,
    print_reports,
    regularisation_captions,
    rename_clashing,
)
from custom_diffusion.weights.constraints import RIDGE, Constraints, LayerReport, drop_equal_rows
from custom_diffusion.weights.format import ConceptWeights, read_weights
from custom_diffusion.weights.text_features import add_tokens, caption_moments, concept_words, text_features


def random_problem(s=12, d=40, out=24, n=200):
    """W0, C, C_reg and V' - all of full rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((out, d), (s, d), (n, d), (s, out))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_constraint_holds_and_the_equations_of_the_paper_agree():
    base, words, captions, targets = random_problem()
    merged, report = Constraints(captions.T @ captions, words, ridge=0).merge(base, targets)
    assert (merged @ words.T - targets.T).abs().max() < 1e-10
    assert report.residual < 1e-10
    d = words @ torch.linalg.inv(captions.T @ captions)
    assert torch.allclose(merged, base + (targets.T - base @ words.T) @ torch.linalg.inv(d @ words.T) @ d, atol=1e-10)
    assert report.conditioning == pytest.approx(torch.linalg.cond(d @ words.T).item(), rel=1e-6)
    change = ((merged - base) @ captions.T).norm() / (base @ captions.T).norm()
    assert report.change == pytest.approx(change.item(), rel=1e-9)


def test_no_other_solution_changes_the_captions_less():
    base, words, captions, targets = random_problem()
    merged, _ = Constraints(captions.T @ captions, words, ridge=0).merge(base, targets)
    best = ((merged - base) @ captions.T).norm()
    free = torch.linalg.svd(words, full_matrices=True).Vh[len(words) :]  # directions that the constraints do not see
    for seed in range(5):
        step = torch.randn(len(base), len(free), generator=torch.Generator().manual_seed(seed)).double() @ free
        other = merged + 1e-2 * step
        assert (other @ words.T - targets.T).abs().max() < 1e-10
        assert ((other - base) @ captions.T).norm() > best


def test_what_needs_no_change_is_not_changed():
    base, words, captions, _ = random_problem()
    merged, report = Constraints(captions.T @ captions, words).merge(base, words @ base.T)
    assert torch.allclose(merged, base, atol=1e-12) and report.change < 1e-12


@pytest.mark.parametrize("n", [15, 60, 200])
def test_the_ridge_spares_captions_that_were_not_read_and_the_constraint_still_holds(n):
    base, words, _, targets = random_problem()
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(0, -1.5, words.shape[1], dtype=torch.float64)  # text features are far from round
    read, unread = (torch.randn(k, len(spectrum), generator=generator).double() * spectrum for k in (n, 2000))
    words = words * spectrum

    def change(ridge):
        constraints = Constraints(read.T @ read, words, ridge=ridge)
        merged, _ = constraints.merge(base, targets)
        assert (merged @ words.T - targets.T).abs().max() < 1e-10
        assert constraints.rank == min(n, len(spectrum))
        return ((merged - base) @ unread.T).norm()

    assert change(RIDGE) < change(1e-8)


def test_more_words_than_features_cannot_be():
    _, words, captions, _ = random_problem(s=41)
    with pytest.raises(ValueError, match="41 constraints for 40 text features"):
        Constraints(captions.T @ captions, words)


def test_as_many_words_as_features_leave_no_choice():
    base, words, captions, targets = random_problem(s=40)
    merged, _ = Constraints(captions.T @ captions, words).merge(base, targets)
    assert torch.allclose(merged @ words.T, targets.T, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_the_rank_of_the_captions_is_told_whatever_their_scale(scale):
    _, words, captions, _ = random_problem(n=15)
    assert Constraints(scale * captions.T @ captions, words).rank == 15


def test_nearly_equal_words_are_warned_of(capsys):
    base, words, captions, targets = random_problem()
    words[1] = words[0] + 1e-7 * words[1]
    _, report = Constraints(captions.T @ captions, words).merge(base, targets)
    print_reports({"x.to_k.weight": report})
    captured = capsys.readouterr()
    assert "ill-conditioned" in captured.err and "change ordinary captions" in captured.err
    assert f"{report.residual:.1e}" in captured.out
    assert len(drop_equal_rows(words)) == len(words) - 1


def concept(*tokens, prompt):
    return ConceptWeights({}, dict.fromkeys(tokens, torch.ones(3)), {"concepts": [{"instance_prompt": prompt}]})


def test_clashing_tokens_are_renamed_in_prompts_too():
    parts = [
        concept("<new1>", "<new2>", prompt="a <new1> cat on a <new2> pot"),
        concept("<new2>", "<new1>", prompt="<new1> and <new2>"),
        concept("sks", "<new3>", prompt="a sks dog by <new3>"),
        concept("sks", prompt="a sks cup"),
    ]
    result, renamed = rename_clashing(parts, {"sks2"})
    assert renamed == [{}, {"<new2>": "<new4>", "<new1>": "<new5>"}, {}, {"sks": "sks3"}]
    prompts = [part.config["concepts"][0]["instance_prompt"] for part in result]
    assert prompts == ["a <new1> cat on a <new2> pot", "<new5> and <new4>", "a sks dog by <new3>", "a sks3 cup"]
    assert [list(part.tokens) for part in result] == [
        ["<new1>", "<new2>"],
        ["<new4>", "<new5>"],
        ["sks", "<new3>"],
        ["sks3"],
    ]


@pytest.fixture(scope="module")
def merged(tiny_model, tmp_path_factory):
    """Two concepts with the same token, and both in one folder."""
    root = tmp_path_factory.mktemp("merge")
    make_concept(root / "cat", tiny_model)
    make_concept(root / "pot", tiny_model, class_prompt="wooden pot", seed=2)
    (root / "captions.txt").write_text(
        "".join(f"photo of the {w} in a {v}\n" for w in ["cat", "pot", "person"] for v in "abcdefgh")
    )
    folders = [str(root / name) for name in ("cat", "pot")]
    run_tool("merge", *folders, "--captions", root / "captions.txt", "--output", root / "both")
    return root


def test_each_concept_keeps_what_its_own_words_do(merged, tiny_model):
    both = read_weights(merged / "both")
    assert list(both.tokens) == both.config["modifier_tokens"] == ["<new1>", "<new2>"]
    pot = read_weights(merged / "pot")
    assert torch.equal(both.tokens["<new2>"], pot.tokens["<new1>"])
    source = ModelSource(str(tiny_model))
    tokenizer, text_encoder = load_tokenizer(source), load_text_encoder(source, torch.device("cpu"))
    add_tokens(tokenizer, text_encoder, both.tokens)
    for prompt, own in (("photo of a <new1> cat", read_weights(merged / "cat")), ("<new2> wooden pot", pot)):
        ids, features = text_features(tokenizer, text_encoder, [prompt])[0]
        start = next(i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)) if piece.startswith("<new"))
        words = features[start:].float()  # the token and all after it
        for name, tensor in own.tensors.items():
            assert torch.allclose(words @ both.tensors[name].T, words @ tensor.T, atol=1e-4)
            assert not torch.allclose(both.tensors[name], tensor, atol=1e-2)


def test_settings_say_what_it_is_made_of(merged):
    config = read_weights(merged / "both").config
    assert [c["instance_prompt"] for c in config["concepts"]] == [
        "photo of a <new1> cat",
        "photo of a <new2> wooden pot",
    ]
    assert [part["renamed"] for part in config["merged_from"]] == [{}, {"<new1>": "<new2>"}]


def test_merged_folder_draws(merged, tiny_model):
    pipe = open_pipeline(tiny_model)
    load_custom_diffusion(pipe, merged / "both")
    assert abs(draw(pipe, "photo of a <new1> cat") - draw(pipe, "photo of a <new2> cat")).max() > 1


def test_different_base_models_are_refused(merged, tiny_model, tiny_v_model):
    make_concept(merged / "other", tiny_v_model, token="<new5>", seed=3)
    with pytest.raises(InputError, match="trained on different models"):
        merge([merged / "cat", merged / "other"], output=merged / "x")
    assert not (merged / "x").exists()


def test_without_captions_sentences_are_made_of_the_classes(merged, tiny_model):
    captions = regularisation_captions([read_weights(merged / name) for name in ("cat", "pot")], [], 200)
    assert captions[:2] == ["a cat", "a wooden pot"] and len(set(captions)) == 2 * len(SENTENCES)


def test_one_concept_twice_is_that_concept(merged, tiny_model):
    """Its words come twice, with the same wish: once is enough, and nothing is ill-conditioned."""
    reports = merge([merged / "cat", merged / "cat"], output=merged / "twice")
    assert max(report.residual for report in reports.values()) < 1e-6
    assert max(report.conditioning for report in reports.values()) < 1e10
    pipe = open_pipeline(tiny_model)
    load_custom_diffusion(pipe, merged / "twice")
    once, twice = (draw(pipe, f"photo of a {token} cat") for token in ("<new1>", "<new2>"))
    assert abs(once - twice).max() < 1


def test_contradictory_wishes_are_refused(merged, tiny_model):
    """The same words, embeddings and all, and weights that do different things with them."""
    cat = read_weights(merged / "cat")
    other = replace(cat, tensors={name: 1.1 * tensor for name, tensor in cat.tensors.items()})
    with pytest.raises(InputError, match="'cat' and 'concept 2' want different things of the same words"):
        merge([merged / "cat", other], output=merged / "never")
    assert not (merged / "never").exists()


def test_a_merge_without_files_in_between_says_how_well_it_went(merged, tiny_model, tmp_path, capsys):
    """Weights already read, and more captions than are asked for."""
    parts = [read_weights(merged / name) for name in ("cat", "pot")]
    captions = merged / "captions.txt"
    reports = merge(parts, captions=[captions], max_captions=24, output=tmp_path / "both")
    captured = capsys.readouterr()
    assert "concept 2: <new1> is now <new2>\n" in captured.out
    assert f"{tmp_path / 'both'}: <new1>, <new2>\n" in captured.out
    assert reports.keys() == parts[0].tensors.keys()
    assert all(report.residual < 1e-6 and 0 < report.change < 5 for report in reports.values())
    both, by_command = read_weights(tmp_path / "both"), read_weights(merged / "both")
    for name, tensor in both.tensors.items():
        assert torch.equal(tensor, by_command.tensors[name])
    config = both.config
    assert config["base_model"] == str(tiny_model) and config["freeze_model"] == "crossattn_kv"
    assert config["revision"] is None and config["variant"] is None
    assert config["versions"] == parts[0].config["versions"] != {}
    assert config["merged_from"] == [
        {"weights": "concept 1", "tokens": ["<new1>"], "renamed": {}, "steps": 5},
        {"weights": "concept 2", "tokens": ["<new2>"], "renamed": {"<new1>": "<new2>"}, "steps": 5},
    ]
    assert by_command.config["merged_from"][1]["weights"] == "pot"
    assert {p.name for p in (tmp_path / "both").iterdir()} == {p.name for p in (merged / "cat").iterdir()} | {
        "<new2>.bin", "<new2>.safetensors"
    }  # fmt: skip


def test_one_caption_is_enough(merged, tmp_path):
    captions = ["--captions", merged / "captions.txt", "--max_captions", "1"]
    run_tool("merge", merged / "cat", merged / "pot", *captions, "--output", tmp_path / "both")
    assert len(read_weights(tmp_path / "both").tokens) == 2


def test_captions_are_taken_in_turn_from_files_and_class_folders(tmp_path):
    (tmp_path / "text").write_text("a cat\n\n  a pot  \na cat\na third\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "caption.txt").write_bytes("Kätzchen\nbroken \xff".encode("latin-1"))
    paths = [tmp_path / "text", str(tmp_path / "folder")]
    every = regularisation_captions([], paths, 200)
    assert every[0] == "a cat" and every[2] == "a pot" and every[4:] == ["a third"]
    assert "tzchen" in every[1] and every[3].startswith("broken ")
    assert regularisation_captions([], paths, 3) == every[:3]
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InputError, match=r"--captions: '.*empty' is empty"):
        regularisation_captions([], [tmp_path / "text", tmp_path / "empty"], 200)


def test_without_classes_captions_must_be_given():
    with pytest.raises(InputError, match="--captions: the weights name no class"):
        regularisation_captions([concept("<new1>", prompt="a <new1> cat")], [], 200)


def test_parts_of_one_model_under_two_names_need_it_named():
    parts = [ConceptWeights({}, {}, {"base_model": "a", "revision": r}) for r in (None, "v2")]
    with pytest.raises(InputError, match=r"different models \('cat' on a, 'pot' on a\)"):
        common_config(["cat", "pot"], parts, None)
    assert common_config(["cat", "pot"], parts, "a") == parts[0].config
    assert common_config(["cat", "pot"], parts[:1] * 2, None) == parts[0].config


def test_parts_of_different_layers_and_without_a_token_are_refused(merged, tmp_path):
    cat, pot = (read_weights(merged / name) for name in ("cat", "pot"))
    fewer = ConceptWeights(dict(list(pot.tensors.items())[:4]), pot.tokens, pot.config)
    with pytest.raises(InputError, match="'concept 2' and 'concept 1' are for different layers"):
        merge([cat, fewer], output=tmp_path / "x")
    with pytest.raises(InputError, match="'concept 2' has no modifier token"):
        merge([cat, ConceptWeights(pot.tensors, {}, pot.config)], output=tmp_path / "x")
    wide = ConceptWeights(pot.tensors, {"<new1>": torch.zeros(7)}, pot.config)
    with pytest.raises(InputError, match=r"--model: the embedding of <new2> is \(7,\), the model's have 32 values"):
        merge([cat, wide], output=tmp_path / "x")
    many = [{"instance_prompt": f"{word} <new1> " + "cat " * 12, "class_prompt": "cat"} for word in ("a", "the", "in")]
    with pytest.raises(InputError, match=r"weights: \d+ constraints for 32 text features; merge fewer"):
        merge([cat, ConceptWeights(pot.tensors, pot.tokens, pot.config | {"concepts": many})], output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_good_merge_is_reported_without_a_warning(capsys):
    print_reports(
        {"a.to_k.weight": LayerReport(1e-9, MAX_CHANGE, MAX_CONDITIONING), "b.to_k.weight": LayerReport(0, 0, 1)}
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    header, first, second = captured.out.splitlines()
    assert first.split() == ["a.to_k", "1.0e-09", "0.5000", "1.0e+10"] and second.split()[0] == "b.to_k"
    assert header.split() == ["layer", "residual", "change", "on", "captions", "conditioning"]
    print_reports({"a": LayerReport(0, 2 * MAX_CHANGE, 1), "b": LayerReport(0, 0, 2 * MAX_CONDITIONING)})
    ill, far = capsys.readouterr().err.splitlines()
    assert "ill-conditioned (2.0e+10)" in ill and "1 of 2 matrices change ordinary captions by more than 50 %" in far


def test_rows_are_equal_within_float32_rounding():
    row = torch.arange(1.0, 5.0)
    rows = torch.stack([row, row * (1 + 1e-6), -row, row + 1e-3, torch.zeros(4), torch.zeros(4)])
    assert torch.equal(drop_equal_rows(rows), rows[[0, 2, 3, 4]])


@pytest.fixture(scope="module")
def reader(tiny_model):
    """Tokenizer and text encoder with two more tokens."""
    source = ModelSource(str(tiny_model))
    tokenizer, text_encoder = load_tokenizer(source), load_text_encoder(source, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    tokens = {token: 10 * torch.randn(32, generator=generator) for token in ("<new1>", "<new2>")}
    add_tokens(tokenizer, text_encoder, tokens)
    rows = text_encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(tokens))]
    assert torch.equal(rows, torch.stack(list(tokens.values())))
    return tokenizer, text_encoder


def test_features_of_a_prompt_are_those_without_its_neighbours(reader):
    prompts = ["a cat", "photo of a <new1> cat in a pot", "pot " * 30]
    together = text_features(*reader, prompts)
    for prompt, (ids, features) in zip(prompts, together):
        ((alone_ids, alone),) = text_features(*reader, [prompt])
        assert ids == alone_ids and len(ids) == len(features) <= 16
        assert features.dtype == torch.float64 and not features.requires_grad
        assert torch.allclose(features, alone, atol=1e-5)


def test_moments_are_of_every_token_but_the_first(reader):
    captions = ["a cat in a pot", "a cat", "the pot", "cat " * 20, "a person"]
    rows = torch.cat([text_features(*reader, [caption])[0][1][1:] for caption in captions])
    for batch_size in (2, 16):
        assert torch.allclose(caption_moments(*reader, captions, batch_size), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_captions_that_do_not_span_the_features_are_warned_of(reader, capsys):
    tokenizer, text_encoder = copy.deepcopy(reader)
    norm = next(module for name, module in text_encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.bias.data += 0.3  # as in a trained model; without a bias, a layer norm leaves one dimension out
    words = [torch.eye(32, dtype=torch.float64)[:3]]
    choices = random.Random(0)
    captions = [" ".join(choices.choices(WORDS, k=9)) for _ in range(100)]
    assert make_constraints(tokenizer, text_encoder, captions, words).rank == 32
    assert "the captions span" not in capsys.readouterr().err
    rank = make_constraints(tokenizer, text_encoder, captions[:1], words).rank
    assert rank < 16
    assert f"the captions span {rank} of 32 text features" in capsys.readouterr().err


def test_words_of_a_concept_are_its_token_and_all_after_it(reader):
    def words(prompts, *tokens):
        config = {"concepts": [{"instance_prompt": prompt} for prompt in prompts]}
        return concept_words(*reader, ConceptWeights({}, dict.fromkeys(tokens), config))

    def features(prompt, start):
        return text_features(*reader, [prompt])[0][1][start:]

    own = words(["a pot", "photo of a <new1> cat"], "<new1>")
    expected = torch.cat([features("photo of a <new1> cat", 4), features("<new1> cat", 1)])
    assert torch.allclose(own, expected, atol=1e-5)  # (3 + 3 rows; the other prompt has no word of the concept)
    both = words(["a <new2> pot <new1>"], "<new1>", "<new2>")
    expected = torch.cat([features("a <new2> pot <new1>", 2), features("<new2> pot <new1>", 1)])
    assert torch.allclose(both, expected, atol=1e-5)
    cut_off = words(["cat " * 20 + "<new1>"], "<new1>")  # beyond the model's 16 tokens
    assert torch.allclose(cut_off, features("<new1>", 1), atol=1e-5)
    unused = words(["a <new1>"], "<new1>", "<new2>")  # a token that no prompt shows speaks for itself
    expected = torch.cat([features("a <new1>", 2), features("<new1>", 1), features("<new2>", 1)])
    assert torch.allclose(unused, expected, atol=1e-5)
