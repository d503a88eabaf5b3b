"""The script that measures on a GPU, tried on a CPU with tiny models: it ends in time, and says what it saw."""

import json
import os
import re
import subprocess
import sys

import pytest
from launch import ENVIRONMENT, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import watched
from gpu_page import page


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What the script wrote, and its page."""
    folder = tmp_path_factory.mktemp("gpu")
    stages = ["model", "checks", "pace", "whole", "large", "profile"]
    where = ["--work_dir", str(folder / "work"), "--output", str(folder / "results.json")]
    subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--stages", *stages, *where],
        cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text()), (folder / "results.html").read_text()


def test_every_stage_is_done_and_every_check_holds(tried):
    result, _ = tried
    assert [stage["status"] for stage in result["stages"]] == ["done"] * 6
    assert [check["seen"] for check in result["checks"] if check["passed"] is not True] == []
    assert len(result["checks"]) == 9
    assert {run["name"]: run["status"] for run in result["runs"]} == dict.fromkeys(
        ("run", "ours, fastest", "ours, cached", "ours", "large, checkpointing", "profile, cached"), "ok"
    )
    assert all(len(run["step_seconds"]) == run["steps"] - 1 for run in result["runs"])
    assert all(run["seconds_a_step"] > 0 for run in result["runs"] if run["steps"] > 2)
    (profile,) = [run["profile"] for run in result["runs"] if run["profile"]]
    kinds = profile["kinds_ms"]
    assert max(kinds, key=kinds.get) == "matrix products, convolutions, attention"
    assert sum(kinds.values()) > 0.5 * (profile["device_ms"] - profile["idle_ms"])


def test_the_page_shows_it_and_needs_nothing_else(tried):
    result, html = tried
    for told in ("tiny models", *(run["name"] for run in result["runs"]), *(c["name"] for c in result["checks"])):
        assert told.lower() in html.lower()
    assert not re.search(r"https?://|<script|<link|<img", html)


def test_what_is_asked_is_told_as_passed_failed_or_not_measured():
    def run(name, seconds, **values):
        return {"name": name, "status": "ok", "seconds_a_step": seconds, "step_seconds": [seconds] * 249,
                "wall_seconds": 300 * seconds, "allocated_bytes": 4e9} | values  # fmt: skip

    fast, slow = run("ours, fastest", 0.02), run("ours, fastest", 0.06)
    runs = [run("reference", 0.1), run("reference", 0.2), fast, fast, slow, run("run", 0.03), run("one", 0.01)]
    runs.append(run("one, checkpointing", 0.01))
    found = {bar["name"]: (bar["measured"], bar["passed"]) for bar in gpu.bars(runs)}
    assert found["steps/s, against the reference's"] == (pytest.approx(0.15 / 0.02), True)
    assert found["seconds of a run's steps, the first aside"] == (pytest.approx(7.47), True)
    assert found["seconds of a run from launch to exit"] == (pytest.approx(9), True)
    assert found["GB allocated: one"] == (4, True)
    assert found["GB allocated: one, checkpointing"] == (4, False)
    assert found["GB allocated: large, checkpointing"] == (None, None)
    failed = [run("one", 0.01, status="out of memory")]
    assert {bar["passed"] for bar in gpu.bars(failed)} == {None}


def test_a_run_that_hangs_is_stopped_and_one_that_fails_says_why(tmp_path):
    runner = gpu.Runner(tmp_path / "logs", seconds=200)
    for name, code in (("hangs", "import time; time.sleep(60)"), ("fails", "raise SystemExit('there is a reason')")):
        (tmp_path / f"{name}.py").write_text(code)
    assert runner.run("hangs", [str(tmp_path / "hangs.py")], limit=3, fork=False)["status"] == "stopped after 3 s"
    assert "there is a reason" in runner.run("fails", [str(tmp_path / "fails.py")], limit=180, fork=False)["status"]
    with pytest.raises(gpu.NoTime):
        gpu.Runner(tmp_path / "logs", seconds=5).run("never", ["never.py"], limit=30)


def test_work_is_told_by_its_name():
    names = {
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products, convolutions, attention",
        "void flash::flash_fwd_kernel<...>": "matrix products, convolutions, attention",
        "aten::addmm": "matrix products, convolutions, attention",
        "void at::native::vectorized_elementwise_kernel<4, add>": "other",
        "void multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "group_norm_kernel": "normalisation",
        "Memcpy HtoD (Pinned -> Device)": "copies and layout",
    }
    assert {name: watched.kind_of(name) for name in names} == names
    assert watched.covered([(0, 2), (1, 3), (5, 6)]) == 4


def test_a_page_can_be_made_of_what_is_there_when_the_time_is_over():
    result = {"device": {"name": "A <GPU>", "memory_bytes": 80 * 2**30}, "versions": {"torch": "2.13.0", "xformers": None},
              "date": "2026-01-01", "python": "3.12", "tiny": False, "peers": [], "seconds": 3.0, "runs": [], "checks": [],
              "bars": gpu.bars([]), "stages": [{"name": "model", "status": "no time left", "seconds": 0.0}]}  # fmt: skip
    html = page(result)
    assert "A &lt;GPU&gt;, 80 GiB" in html and "no time left" in html and "not measured" in html
