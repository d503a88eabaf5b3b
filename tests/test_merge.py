"""Merging: the paper's equations on random data, then whole folders."""

from dataclasses import replace

import pytest
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool

from custom_diffusion import load_custom_diffusion, merge
from custom_diffusion.errors import InputError
from custom_diffusion.model.loading import load_text_encoder, load_tokenizer
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.merge import SENTENCES, print_reports, regularisation_captions, rename_clashing
from custom_diffusion.weights.constraints import RIDGE, Constraints, drop_equal_rows
from custom_diffusion.weights.format import ConceptWeights, read_weights
from custom_diffusion.weights.text_features import add_tokens, text_features


def random_problem(s=12, d=40, out=24, n=200):
    """W0, C, C_reg and V' - all of full rank."""
    random = torch.Generator().manual_seed(0)
    shapes = ((out, d), (s, d), (n, d), (s, out))
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


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
    random = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(0, -1.5, words.shape[1], dtype=torch.float64)  # text features are far from round
    read, unread = (torch.randn(k, len(spectrum), generator=random).double() * spectrum for k in (n, 2000))
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
