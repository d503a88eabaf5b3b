"""What a folder holds, told in lines."""

import json

from fake_concept import make_concept, run_tool


def told(folder, capsys):
    run_tool("info", folder)
    lines = capsys.readouterr().out.splitlines()
    return {line.split(":", 1)[0]: line.split(":", 1)[1].strip() for line in lines}


def test_tells_what_a_folder_holds(tiny_model, tmp_path, capsys):
    weights = make_concept(tmp_path / "cat", tiny_model)
    lines = told(tmp_path / "cat", capsys)
    count = sum(tensor.numel() for tensor in weights.tensors.values())
    assert lines == {
        "base model": str(tiny_model),
        "tokens": "<new1> (32 values)",
        "prompt": "photo of a <new1> cat (class: cat)",
        "method": "crossattn_kv: to_k, to_v of 4 cross-attentions",
        "parameters": f"{count:,} in 8 tensors",
        "size": f"{4 * count / 1e6:.2f} MB",
        "steps": "5",
        "training": "learning_rate=1e-05",
        "versions": "torch 2.13.0",
    }


def test_tells_of_faces_and_of_folders_without_settings(tiny_model, tmp_path, capsys):
    make_concept(tmp_path / "faces", tiny_model, crossattn=True)
    (tmp_path / "faces" / "custom_diffusion_config.json").unlink()
    lines = told(tmp_path / "faces", capsys)
    assert lines["base model"] == "not recorded" and lines["tokens"] == "<new1> (32 values)"
    assert lines["method"] == "crossattn: to_k, to_out.0, to_q, to_v of 4 cross-attentions"


def test_tells_of_compression(tiny_model, tmp_path, capsys):
    make_concept(tmp_path / "cat", tiny_model)
    run_tool("compress", tmp_path / "cat", "--output", tmp_path / "small", "--rank", 3)
    capsys.readouterr()
    assert told(tmp_path / "small", capsys)["compressed"] == "rank 3"


def test_tells_of_two_text_encoders(tiny_xl_model, tmp_path, capsys):
    weights = make_concept(tmp_path / "cat", tiny_xl_model)
    lines = told(tmp_path / "cat", capsys)
    assert lines["tokens"] == "<new1> (32 + 40 values)"
    assert lines["method"] == f"crossattn_kv: to_k, to_v of {len(weights.tensors) // 2} cross-attentions"
    config = tmp_path / "cat" / "custom_diffusion_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"family": "Stable Diffusion XL"}))
    assert told(tmp_path / "cat", capsys)["family"] == "Stable Diffusion XL"
