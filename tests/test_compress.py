"""Compressed weights: what is kept, what it costs, and that they load like the rest."""

import json

import pytest
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool
from tiny import make_model

from custom_diffusion import compress, export, load_custom_diffusion, merge, unload_custom_diffusion
from custom_diffusion.errors import InputError
from custom_diffusion.files import CONFIG_NAME, DELTAS_NAME, WEIGHTS_NAME
from custom_diffusion.model.loading import base_tensors
from custom_diffusion.model.source import ModelSource
from custom_diffusion.weights.format import read_weights
from custom_diffusion.weights.low_rank import Decomposition, changes, decompose, full_tensors, rank_summary


@pytest.fixture(scope="module")
def concept(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concept")
    make_concept(folder, tiny_model)
    return folder


def run(weights, output, *flags):
    run_tool("compress", weights, "--output", output, *flags)
    return output


def known_change(values):
    """A change with these singular values."""
    left, _ = torch.linalg.qr(torch.randn(9, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(7, len(values), dtype=torch.float64))
    return (left * torch.tensor(values)) @ right.T


def test_energy_is_a_share_of_the_sum_of_singular_values():
    parts = decompose(known_change([6.0, 2.0, 1.0, 1.0]))
    assert [parts.rank_for(share, power=1) for share in (0.1, 0.59, 0.61, 0.79, 0.81, 1)] == [1, 1, 2, 2, 3, 7]
    assert [parts.rank_for(share, power=2) for share in (0.85, 0.86, 0.96)] == [1, 2, 3]  # squares: 36, 4, 1, 1 of 42
    assert parts.kept(2) == pytest.approx(40 / 42)


def test_a_share_that_is_met_exactly_needs_no_more():
    parts = Decomposition(torch.eye(3), torch.tensor([2.0, 1.0, 1.0]), torch.eye(3))
    assert [parts.rank_for(share, power=1) for share in (0.5, 0.75)] == [1, 2]
    small = Decomposition(torch.eye(3), torch.tensor([0.02, 0.01, 0.01]), torch.eye(3))
    assert small.kept(1) == pytest.approx(4 / 6)  # a share, however small the change


def test_ranks_are_summed_up():
    assert rank_summary([4, 4, 4]) == "rank 4"
    assert rank_summary([9, 2, 5, 3]) == "ranks 2 to 9, median 5"


def test_truncation_is_the_nearest_matrix_of_its_rank():
    delta = known_change([6.0, 2.0, 1.0, 1.0])
    parts = decompose(delta)
    assert (parts.left.shape, parts.values.shape, parts.right.shape) == ((9, 7), (7,), (7, 7))
    kept = parts.truncated(2)
    error = torch.linalg.svdvals(delta - kept.up @ kept.down)
    assert torch.allclose(error[:3], torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-9)
    assert torch.allclose(kept.up.norm(dim=0), kept.down.norm(dim=1))


def test_no_change_compresses_to_no_change():
    parts = decompose(torch.zeros(4, 3))
    assert parts.rank_for(0.6, power=1) == 1 and torch.equal(parts.truncated(1).matrix(), torch.zeros(4, 3))
    assert parts.kept(1) == 1


def test_compressed_weights_become_whole_again(tiny_model, tmp_path):
    full = make_concept(tmp_path / "full", tiny_model, crossattn=True)
    run(tmp_path / "full", tmp_path / "small", "--energy", "1")
    base = base_tensors(ModelSource(str(tiny_model)), full.shapes())
    whole = full_tensors(read_weights(tmp_path / "small"), base)
    assert whole.keys() == full.tensors.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, full.tensors[name], atol=1e-5), name


@pytest.mark.parametrize("crossattn", [False, True])
def test_full_energy_draws_the_same_picture(tiny_model, tmp_path, crossattn):
    make_concept(tmp_path / "full", tiny_model, crossattn=crossattn)
    run(tmp_path / "full", tmp_path / "small", "--energy", "1")
    pipe = open_pipeline(tiny_model)
    base = draw(pipe)
    load_custom_diffusion(pipe, tmp_path / "full")
    expected = draw(pipe)
    load_custom_diffusion(pipe, tmp_path / "small")
    assert abs(draw(pipe) - expected).max() < 1 < abs(base - expected).max()


def test_loads_like_the_rest_and_comes_out_bit_for_bit(concept, tiny_model, tmp_path):
    run(concept, tmp_path / "small", "--energy", "0.6")
    pipe = open_pipeline(tiny_model, torch_dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    load_custom_diffusion(pipe, tmp_path / "small")
    small = read_weights(tmp_path / "small")
    for name, delta in small.deltas.items():
        # Summed in float32 and rounded once.
        assert torch.equal(pipe.unet.get_parameter(name), (before[name].float() + delta.matrix()).half())
    assert "<new1>" in pipe.tokenizer.get_vocab()
    unload_custom_diffusion(pipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())


def test_is_smaller_and_keeps_what_it_says(concept, tiny_model, tmp_path, capsys):
    run(concept, tmp_path / "small", "--rank", "2")
    assert {p.name for p in (tmp_path / "small").iterdir()} == {
        "custom_diffusion_deltas.safetensors", "custom_diffusion_config.json", "<new1>.safetensors"
    }  # fmt: skip
    small, full = read_weights(tmp_path / "small"), read_weights(concept)
    assert torch.equal(small.tokens["<new1>"], full.tokens["<new1>"])
    assert {delta.up.shape[1] for delta in small.deltas.values()} == {2}
    base = base_tensors(ModelSource(str(tiny_model)), full.shapes())
    for name, delta in changes(full, base):
        values = torch.linalg.svdvals(delta)
        error = (delta - small.deltas[name].matrix()).norm()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-3)
    assert "rank 2;" in capsys.readouterr().out
    run(tmp_path / "small", tmp_path / "smaller", "--rank", "1")  # compressed weights can be compressed on
    assert {delta.up.shape[1] for delta in read_weights(tmp_path / "smaller").deltas.values()} == {1}


def test_another_base_model_is_noticed(concept, tmp_path, capsys):
    other = make_model(tmp_path / "other", seed=7)
    run(concept, tmp_path / "small", "--model", str(other))
    assert "is it the right --model?" in capsys.readouterr().err
    assert json.loads((tmp_path / "small" / "custom_diffusion_config.json").read_text())["base_model"] == str(other)
    config = other / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(InputError, match="were they trained on another model"):
        compress(concept, output=tmp_path / "wrong", model=str(other))
    assert not (tmp_path / "wrong").exists()


def test_a_merge_that_changed_much_is_not_taken_for_another_model(tiny_model, tmp_path, capsys):
    """Merging moves weights far in the few directions of the concepts' words."""
    parts = [
        make_concept(tmp_path / str(seed), tiny_model, f"<new{seed}>", class_prompt, seed)
        for seed, class_prompt in ((1, "cat"), (2, "pot"))
    ]
    base = base_tensors(ModelSource(str(tiny_model)), parts[0].tensors)
    for part in parts:
        part.tensors = {name: base[name] + 5 * (tensor - base[name]) for name, tensor in part.tensors.items()}
    merge(parts, output=tmp_path / "both")
    trained = torch.cat([tensor.flatten() for tensor in read_weights(tmp_path / "both").tensors.values()])
    before = torch.cat([tensor.flatten() for tensor in base.values()])
    assert torch.nn.functional.cosine_similarity(trained, before, dim=0) < 0.5
    compress(tmp_path / "both", output=tmp_path / "small")
    export(tmp_path / "both", to="lora", output=tmp_path / "lora")
    assert "is it the right --model?" not in capsys.readouterr().err


@pytest.mark.parametrize("crossattn", [False, True])
def test_the_result_is_never_larger_than_what_it_was_made_of(tiny_model, tmp_path, crossattn):
    full = make_concept(tmp_path / "full", tiny_model, crossattn=crossattn)
    run(tmp_path / "full", tmp_path / "all", "--energy", "1")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        f"{WEIGHTS_NAME}.safetensors", "<new1>.safetensors", CONFIG_NAME
    }  # fmt: skip
    assert all(
        torch.equal(tensor, full.tensors[name]) for name, tensor in read_weights(tmp_path / "all").tensors.items()
    )
    run(tmp_path / "full", tmp_path / "most", "--energy", "0.999")  # square matrices: factors of full rank, in half
    sizes = [
        path.stat().st_size
        for path in (tmp_path / "full" / f"{WEIGHTS_NAME}.safetensors", tmp_path / "most" / DELTAS_NAME)
    ]
    assert sizes[1] <= sizes[0]
    run(tmp_path / "full", tmp_path / "small", "--rank", "2")
    for flags in (["--rank", "2"], ["--energy", "1"]):  # of what is compressed already
        again = tmp_path / flags[0].strip("-")
        run(tmp_path / "small", again, *flags)
        assert (again / DELTAS_NAME).stat().st_size == (tmp_path / "small" / DELTAS_NAME).stat().st_size
    small, kept = read_weights(tmp_path / "small"), read_weights(tmp_path / "energy")
    assert all(torch.equal(kept.deltas[name].up, delta.up) for name, delta in small.deltas.items())


def test_damaged_file_is_named(concept, tmp_path):
    run(concept, tmp_path / "small")
    path = tmp_path / "small" / "custom_diffusion_deltas.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"custom_diffusion_deltas.safetensors' is damaged"):
        read_weights(tmp_path / "small")


def test_words_of_two_text_encoders_stay_apart(tiny_xl_model, tmp_path):
    full = make_concept(tmp_path / "full", tiny_xl_model)
    run(tmp_path / "full", tmp_path / "small", "--energy", "0.999")
    small = read_weights(tmp_path / "small")
    assert small.token_widths == (32, 40) and len(small.deltas) == len(full.tensors)
    assert torch.equal(small.tokens["<new1>"], full.tokens["<new1>"])
    pipe = open_pipeline(tiny_xl_model)
    base = draw(pipe)
    load_custom_diffusion(pipe, tmp_path / "full")
    expected = draw(pipe)
    load_custom_diffusion(pipe, tmp_path / "small")
    assert abs(draw(pipe) - expected).mean() < 0.1 * abs(base - expected).mean()
