"""Merging: least squares on random data, then whole folders."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool

from custom_diffusion import load_custom_diffusion, merge
from custom_diffusion.errors import InputError
from custom_diffusion.model.loading import base_tensors, load_text
from custom_diffusion.model.source import ModelSource, base_of
from custom_diffusion.model.text_features import (
    BATCH_SIZE,
    add_tokens,
    concept_words,
    moments,
    position_weights,
    text_features,
)
from custom_diffusion.tools.merge import (
    CONTEXTS,
    MAX_LOST,
    SENTENCES,
    common_config,
    concept_prompts,
    contexts,
    phrases,
    print_reports,
    regularisation_captions,
    rename_clashing,
)
from custom_diffusion.weights.format import ConceptWeights, read_weights
from custom_diffusion.weights.least_squares import (
    CAPTION_WEIGHT,
    RIDGE,
    Contradiction,
    LayerReport,
    LeastSquares,
    check_contradictions,
    report,
)


def random_problem(concepts=2, d=20, out=12, rows=40):
    """W0, each concept's Wp and rows of features, and C_reg: more wishes than any W can fulfil."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        random(out, d),
        [random(out, d) for _ in range(concepts)],
        [random(rows, d) for _ in range(concepts)],
        random(150, d),
    )


def mean_moments(rows):
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_it_is_the_least_squares_solution(concepts):
    """Against a solver that is given every row, with its weight, and the ridge's."""
    base, parts, words, captions = random_problem(concepts)
    merged = LeastSquares([mean_moments(rows) for rows in words], mean_moments(captions)).merge(base, parts)
    together = sum(mean_moments(rows) for rows in words) + CAPTION_WEIGHT * mean_moments(captions)
    ridge = RIDGE * together.trace() / len(together)
    rows = [rows / len(rows) ** 0.5 for rows in [*words, captions]]
    rows[-1] = CAPTION_WEIGHT**0.5 * rows[-1]
    rows.append(ridge**0.5 * torch.eye(len(together), dtype=torch.float64))
    wishes = torch.cat([row @ matrix.T for row, matrix in zip(rows, [*parts, base, base])])
    assert torch.allclose(merged, torch.linalg.lstsq(torch.cat(rows), wishes).solution.T, atol=1e-10)


def test_what_was_not_trained_is_not_changed():
    base, _, words, captions = random_problem()
    solution = LeastSquares([mean_moments(rows) for rows in words], mean_moments(captions))
    assert torch.equal(solution.merge(base, [base, base]), base)
    told = report(base, base, [base, base], [mean_moments(rows) for rows in words], mean_moments(captions))
    assert told == LayerReport((0.0, 0.0), 0.0, 0.0)


def test_concepts_with_words_of_their_own_are_kept_whole():
    """Three in subspaces that have nothing in common with one another or with the captions."""
    base, parts, words, captions = random_problem(concepts=3)
    for number, rows in enumerate([*words, captions]):
        rows[:, : 5 * number] = rows[:, 5 * (number + 1) :] = 0
    all_moments = [mean_moments(rows) for rows in words]
    merged = LeastSquares(all_moments, mean_moments(captions), ridge=1e-9).merge(base, parts)
    for rows, part in zip(words, parts):
        assert torch.allclose(merged @ rows.T, part @ rows.T, atol=1e-6)
    assert torch.allclose(merged @ captions.T, base @ captions.T, atol=1e-6)
    told = report(merged, base, parts, all_moments, mean_moments(captions))
    assert max(told.lost) < 1e-6 and told.change < 1e-6


def test_a_heavier_weight_of_the_captions_changes_them_less_and_keeps_less():
    base, parts, words, captions = random_problem()
    fitted, ordinary = [mean_moments(rows) for rows in words], mean_moments(captions)
    told = [
        report(LeastSquares(fitted, ordinary, weight).merge(base, parts), base, parts, fitted, ordinary)
        for weight in (0.01, 0.1, 1.0, 10.0)
    ]
    for less, more in pairwise(told):
        assert more.change < less.change and sum(more.lost) > sum(less.lost)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_scale_of_the_features_does_not_matter(scale):
    base, parts, words, captions = random_problem()
    expected = LeastSquares([mean_moments(rows) for rows in words], mean_moments(captions)).merge(base, parts)
    merged = LeastSquares([mean_moments(scale * rows) for rows in words], mean_moments(scale * captions))
    assert torch.allclose(merged.merge(base, parts), expected, atol=1e-9)


@pytest.mark.parametrize("n", [5, 15, 30])
def test_the_ridge_spares_captions_that_were_not_read(n):
    base, parts, words, _ = random_problem(d=40)
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(0, -1.5, 40, dtype=torch.float64)  # text features are far from round
    read, unread = (torch.randn(k, 40, generator=generator).double() * spectrum for k in (n, 2000))
    fitted = [mean_moments(rows[:6] * spectrum) for rows in words]  # fewer than dimensions

    def change(ridge):
        return ((LeastSquares(fitted, mean_moments(read), ridge=ridge).merge(base, parts) - base) @ unread.T).norm()

    assert change(RIDGE) < change(1e-9)


def test_the_report_is_of_norms_of_what_the_rows_give():
    base, (first, second), words, captions = random_problem()
    merged = 0.5 * (first + second)
    told = report(merged, base, [first, second], [mean_moments(rows) for rows in words], mean_moments(captions))
    for lost, part, rows in zip(told.lost, (first, second), words):
        assert lost == pytest.approx(float(((merged - part) @ rows.T).norm() / ((part - base) @ rows.T).norm()))
    change, one, other = (
        float(((matrix - base) @ captions.T).norm() / (base @ captions.T).norm()) for matrix in (merged, first, second)
    )
    assert told.change == pytest.approx(change) and told.trained_change == pytest.approx(max(one, other))


def test_contradictions_are_told_by_their_concepts():
    _, (first, second), words, _ = random_problem(rows=3)
    own, others = words
    common = torch.cat([others[:1], own[1:2] * (1 + 1e-7)])  # equal to a row within float32 rounding
    check_contradictions([own, others], [{"a": first}, {"a": second}])
    check_contradictions([own, own], [{"a": first, "b": second}] * 2)
    with pytest.raises(Contradiction) as caught:
        check_contradictions([own, common], [{"a": first, "b": first}, {"a": first, "b": second}])
    assert (caught.value.first, caught.value.second) == (0, 1)


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


@pytest.fixture(scope="module")
def both_read(merged, tiny_model):
    """The merged weights, each part by its words there, the base's matrices, and the text encoders with the new words."""
    both, source = read_weights(merged / "both"), ModelSource(str(tiny_model))
    text = load_text(source, torch.device("cpu"))
    add_tokens(text, both.tokens)
    parts = {"<new1> cat": read_weights(merged / "cat"), "<new2> wooden pot": read_weights(merged / "pot")}
    return both, parts, base_tensors(source, list(both.tensors)), text


def lost_in(sentences, weights, read):
    """Of each concept's trained change: the mean over the matrices, in these sentences and the padding after them."""
    _, parts, base, text = read
    shares = []
    for phrase, part in parts.items():
        there = moments(text, [sentence.format(phrase) for sentence in sentences], [phrase.split()[0]])
        reports = [report(weights[n], base[n], [part.tensors[n]], [there], there) for n in base]
        shares.append(sum(told.lost[0] for told in reports) / len(reports))
    return shares


def test_sentences_that_the_merge_has_not_read_keep_more_than_of_plain_averages(merged, both_read):
    both, parts, base, _ = both_read
    assert list(both.tokens) == both.config["modifier_tokens"] == ["<new1>", "<new2>"]
    assert torch.equal(both.tokens["<new2>"], parts["<new2> wooden pot"].tokens["<new1>"])
    average = {n: sum(part.tensors[n] for part in parts.values()) / 2 for n in base}
    unread = ["the {} sitting in a bucket", "person of the {} in a photo", "a bucket of {}"]
    captions = (merged / "captions.txt").read_text().splitlines()
    for phrase, part in parts.items():
        own = phrase.replace("<new2>", "<new1>")
        assert not {sentence.format(own) for sentence in unread} & set(concept_prompts(part, captions))
    ours, theirs = lost_in(unread, both.tensors, both_read), lost_in(unread, average, both_read)
    assert max(ours) < max(theirs) and sum(ours) < 0.9 * sum(theirs)


def test_a_handful_of_exact_rows_keeps_less_in_other_sentences(merged, both_read):
    """The paper's equations 4 and 5, with which this began: exact in two sentences, and far off in others."""
    both, parts, base, text = both_read
    captions = (merged / "captions.txt").read_text().splitlines()
    exact_in = ["photo of a {}", "{}"]
    words = {p: concept_words(text, [s.format(p) for s in exact_in], [p.split()[0]]) for p in parts}
    rows = torch.cat(list(words.values()))
    ordinary = moments(text, captions)
    ordinary += RIDGE * ordinary.trace() / len(ordinary) * torch.eye(len(ordinary))
    d = torch.linalg.solve(ordinary, rows.T).T
    paper = {}
    for name, matrix in base.items():
        wishes = torch.cat([words[phrase] @ part.tensors[name].double().T for phrase, part in parts.items()])
        errors = wishes.T - matrix.double() @ rows.T
        paper[name] = (matrix + errors @ torch.linalg.pinv(d @ rows.T) @ d).float()
        assert torch.allclose(paper[name].double() @ rows.T, wishes.T, atol=1e-3)
    unread = ["the {} sitting in a bucket", "a bucket of {}"]
    assert sum(lost_in(unread, both.tensors, both_read)) < 0.6 * sum(lost_in(unread, paper, both_read))


def test_concepts_of_a_model_with_two_text_encoders_are_merged(tiny_xl_model, tmp_path):
    random, parts = torch.Generator().manual_seed(3), []
    for seed, class_prompt in enumerate(["cat", "wooden pot"]):
        weights = make_concept(tmp_path / class_prompt, tiny_xl_model, class_prompt=class_prompt, seed=seed)
        embedding = 10 * torch.randn(32 + 40, generator=random)
        parts.append(replace(weights, tokens={"<new1>": embedding}, token_widths=(32, 40)))
    reports = merge(parts, output=tmp_path / "both")
    assert all(max(told.lost) < 0.9 and told.change < told.trained_change for told in reports.values())
    both = read_weights(tmp_path / "both")
    assert both.token_widths == (32, 40) and torch.equal(both.tokens["<new2>"], parts[1].tokens["<new1>"])
    narrow = replace(parts[1], tokens={"<new1>": torch.zeros(32)}, token_widths=())
    with pytest.raises(InputError, match=r"the embedding of <new2> is \(32,\), the model's have 32 \+ 40 values"):
        merge([parts[0], narrow], output=tmp_path / "never")


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
    """Its words come twice, with the same wish: both get it, and so do both their tokens."""
    reports = merge([merged / "cat", merged / "cat"], output=merged / "twice")
    assert max(max(told.lost) for told in reports.values()) < 0.3
    pipe = open_pipeline(tiny_model)
    load_custom_diffusion(pipe, merged / "twice")
    once, twice = (draw(pipe, f"photo of a {token} cat") for token in ("<new1>", "<new2>"))
    assert abs(once - twice).max() < 1


def test_a_concept_and_its_checkpoint_share_what_they_want(merged, tiny_model):
    """Their words are nearly equal, and what is wanted of them too: no large change comes of the small differences."""
    cat = read_weights(merged / "cat")
    random = torch.Generator().manual_seed(7)
    earlier = replace(
        cat,
        tensors={n: v + 1e-3 * torch.randn(v.shape, generator=random) for n, v in cat.tensors.items()},
        tokens={token: row + 1e-3 * torch.randn(row.shape, generator=random) for token, row in cat.tokens.items()},
    )
    reports = merge([cat, earlier], output=merged / "checkpoint")
    assert max(max(told.lost) for told in reports.values()) < 0.3
    assert all(told.change < 1.1 * told.trained_change for told in reports.values())


def test_contradictory_wishes_are_refused(merged, tiny_model):
    """The same words, embeddings and all, and weights that do different things with them."""
    cat = read_weights(merged / "cat")
    other = replace(cat, tensors={name: 1.1 * tensor for name, tensor in cat.tensors.items()})
    with pytest.raises(InputError, match="'cat' and 'concept 2' want different things of the same words"):
        merge([merged / "cat", other], output=merged / "never")
    assert not (merged / "never").exists()


def test_a_merged_folder_is_drawn_with_the_vae_and_the_prediction_of_its_concepts(merged, tiny_model, tmp_path):
    parts = [read_weights(merged / name) for name in ("cat", "pot")]
    for part in parts:
        vae = {"pretrained_vae_model_name_or_path": str(tiny_model / "vae"), "prediction_type": "v_prediction"}
        part.config["settings"] = part.config.get("settings", {}) | vae
    merge(parts, captions=[merged / "captions.txt"], output=tmp_path / "both")
    source = base_of(read_weights(tmp_path / "both").config, None, None, None)
    assert source.vae == str(tiny_model / "vae") and source.prediction_type == "v_prediction"


def test_a_merge_without_files_in_between_says_how_well_it_went(merged, tiny_model, tmp_path, capsys):
    """Weights already read, and more captions than are asked for."""
    parts = [read_weights(merged / name) for name in ("cat", "pot")]
    captions = merged / "captions.txt"
    reports = merge(parts, captions=[captions], max_captions=24, output=tmp_path / "both")
    captured = capsys.readouterr()
    assert "concept 2: <new1> is now <new2>\n" in captured.out
    assert f"{tmp_path / 'both'}: <new1>, <new2>\n" in captured.out
    assert reports.keys() == parts[0].tensors.keys()
    assert all(len(told.lost) == 2 and 0 < max(told.lost) < 0.9 for told in reports.values())
    assert all(0 < told.change < told.trained_change < 5 for told in reports.values())
    assert captured.out.count("of the trained change is lost") == 2 and captured.out.startswith("concept 2: <new1>")
    assert "captions" not in captured.err
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
    assert not (tmp_path / "x").exists()


def test_a_good_merge_is_reported_without_a_warning(capsys):
    good = {"a.to_k.weight": LayerReport((2 * MAX_LOST, 0.1), 0.5, 0.5), "b.to_k.weight": LayerReport((0.0, 0.2), 0, 1)}
    print_reports(["cat", "pot"], good)
    captured = capsys.readouterr()
    assert captured.err == ""
    header, first, second, cat, pot = captured.out.splitlines()
    assert header.split("  ")[-4:] == ["lost of cat", "lost of pot", "change on captions", "in training"]
    assert (
        first.split() == ["a.to_k.weight", "1.600", "0.100", "0.5000", "0.5000"]
        and second.split()[0] == "b.to_k.weight"
    )
    assert cat.startswith("cat: 0.80 of the trained change") and pot.startswith("pot: 0.15 of")
    print_reports(["cat", "pot"], good | {"c": LayerReport((0.9, 0.0), 0.2, 0.1)})
    little, far = capsys.readouterr().err.splitlines()
    assert "keeps little of 'cat'" in little and "1 of 3 matrices change ordinary captions by more than" in far


@pytest.fixture(scope="module")
def reader(any_model):
    """The text encoders of a model of each family, with two more tokens."""
    text = load_text(ModelSource(str(any_model)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    tokens = {token: 10 * torch.randn(sum(text.widths), generator=generator) for token in ("<new1>", "<new2>")}
    add_tokens(text, tokens)
    rows = [
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(tokens))]
        for tokenizer, encoder in zip(text.tokenizers, text.encoders)
    ]
    assert torch.equal(torch.cat(rows, dim=1), torch.stack(list(tokens.values())))
    return text


def test_features_of_a_prompt_are_those_that_a_pipeline_draws_with(reader, any_model):
    prompts = ["a cat", "photo of a <new1> cat in a pot", "pot " * 30, ""]
    ids, features = text_features(reader, prompts)
    assert ids.shape == (4, 16) and features.shape == (4, 16, sum(reader.widths))
    assert features.dtype == torch.float64 and not features.requires_grad
    pipe = open_pipeline(any_model)
    for name, part in reader.parts().items():
        setattr(pipe, name, part)
    for prompt, ours in zip(prompts, features):
        drawn_with = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.allclose(ours.float(), drawn_with[0][0], atol=1e-5)


def test_all_padding_weighs_as_much_as_one_word():
    ids = torch.tensor([[7, 1, 5, 9, 9, 9, 9], [7, 1, 2, 3, 4, 8, 9], [7, 1, 5, 8, 2, 9, 0], [7, 9, 0, 0, 0, 0, 0]])
    quarter = [1, 1, 1, 1, 1 / 3, 1 / 3, 1 / 3]
    expected = torch.tensor([quarter, [1] * 7, [1] * 7, [1, 1, 0.2, 0.2, 0.2, 0.2, 0.2]])
    assert torch.allclose(position_weights(ids, 9), expected)  # whether padding is the end token or another
    own = position_weights(ids, 9, torch.tensor([5, 8]))
    first = torch.tensor([2, 5, 2, 7])
    assert torch.allclose(own, expected * (torch.arange(7) >= first[:, None]))


def test_moments_are_the_mean_of_the_prompts_read_in_batches(reader):
    prompts = [
        f"{beginning} <new1> cat {end}" for beginning in ("a", "the", "photo of") for end in ("pot in a " * 3).split()
    ]
    prompts = 2 * prompts + ["cat"]  # which has no word of the concept
    assert len(prompts) > 2 * BATCH_SIZE

    def rows(prompt, own=None):
        ids, features = text_features(reader, [prompt])
        return features[0] * position_weights(ids, reader.tokenizers[0].eos_token_id, own)[0].double().sqrt().unsqueeze(
            -1
        )

    own = torch.tensor(reader.tokenizers[0].convert_tokens_to_ids(["<new1>"]))
    for tokens, ids in ((["<new1>"], own), (None, None)):
        expected = sum(rows(prompt, ids).T @ rows(prompt, ids) for prompt in prompts) / len(prompts)
        assert torch.allclose(moments(reader, prompts, tokens), expected, rtol=1e-4, atol=1e-5)


def test_words_of_a_concept_are_its_token_and_all_after_it(reader):
    def features(prompt, *positions):
        return text_features(reader, [prompt])[1][0, positions]

    own = concept_words(reader, ["a pot", "photo of a <new1> cat"], ["<new1>"])
    assert torch.allclose(own, features("photo of a <new1> cat", 4, 5, 6), atol=1e-5)
    both = concept_words(reader, ["a <new2> pot <new1>"], ["<new1>", "<new2>"])
    assert torch.allclose(both, features("a <new2> pot <new1>", 2, 3, 4, 5), atol=1e-5)
    assert len(concept_words(reader, ["cat " * 20 + "<new1>"], ["<new1>"])) == 0  # beyond the model's 16 tokens


def spoken(prompt, class_prompt=None, tokens=("<new1>",)):
    settings = {"concepts": [{"instance_prompt": prompt, "class_prompt": class_prompt}]}
    return ConceptWeights({}, dict.fromkeys(tokens), settings)


@pytest.mark.parametrize(("prompt", "class_prompt", "tokens", "expected"), [
    ("photo of a <new1> wooden pot", "wooden pot", ["<new1>"], [("photo of a ", "<new1> wooden pot", "wooden pot")]),
    ("a <new1> cat on a mat", "cat", ["<new1>"], [("a ", "<new1> cat", "cat")]),
    ("a <new1> old cat", "cat", ["<new1>"], [("a ", "<new1> old cat", "cat")]),
    ("a cat in <new1> style", "cat", ["<new1>"], [("a ", "cat in <new1>", "cat")]),
    ("a <new1>", "cat", ["<new1>"], [("a ", "<new1>", "cat")]),
    ("<new1> cats", "cat", ["<new1>"], [("", "<new1>", "cat")]),
    ("a <new2> cat on <new1>", None, ["<new1>", "<new2>"], [("a ", "<new2> cat on <new1>", None)]),
    ("a <new1> cat", "cat", ["<new1>", "<new2>"], [("a ", "<new1> cat", "cat"), ("", "<new2>", None)]),
    ("a cat", "cat", ["<new1>"], [("", "<new1>", None)]),
])  # fmt: skip
def test_how_a_concept_is_called_is_read_from_its_prompt(prompt, class_prompt, tokens, expected):
    assert phrases(spoken(prompt, class_prompt, tokens)) == expected


def test_sentences_about_a_concept_are_made_of_captions_that_name_its_class():
    captions = ["A Cat on a mat", "a dog", "concatenated", "the big cat."] + [f"my cat {i}" for i in range(200)]
    found = contexts("cat", captions)
    assert found[:3] == [("A ", " on a mat"), ("the big ", "."), ("my ", " 0")] and len(found) == CONTEXTS
    few = contexts("dog", captions)
    assert (
        few[0] == ("a ", "")
        and len(few) == 1 + len(SENTENCES)
        and few[-1] == ("my ", " under a tree, in the morning light")
    )
    assert contexts(None, captions) == few[1:]
    prompts = concept_prompts(spoken("photo of a <new1> cat", "cat"), captions)
    assert {"photo of a <new1> cat", "zoomed in photo of a <new1> cat", "<new1> cat", "A <new1> cat on a mat"} < set(
        prompts
    )
    assert any(prompt.startswith("photo of a <new1> cat ") for prompt in prompts)
    assert len(set(prompts)) == len(prompts) and all("<new1> cat" in prompt for prompt in prompts)
    assert "two <new1>s in a garden" in concept_prompts(spoken("a <new1>"), captions)
