"""The core of the test suite on several sets of versions, each in a virtual environment of its own: `make matrix`.

Prints a row of docs/versions.md for each.
"""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-matrix"
# torch: the release that the tests use, so that a cell does not bring another of several GB.
CELLS = {
    "oldest": ["--constraint", "requirements-oldest.txt"],
    "0.36-4.57": ["torch==2.13.0", "diffusers==0.36.*", "transformers==4.57.*"],
    "0.39-5.6": ["torch==2.13.0", "diffusers==0.39.*", "transformers==5.6.*"],
    "newest": ["--constraint", "constraints.txt"],
}
SHOWN = ("torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "datasets", "peft", "numpy")


def install(name: str) -> Path:
    """The Python of the cell's environment."""
    python = FOLDER / name / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
    for arguments in (["--upgrade", "pip"], [*CELLS[name], "--editable", ".[test]"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, cwd=ROOT)
    return python


def installed(python: Path) -> list[str]:
    code = f"import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {SHOWN}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def run_tests(name: str, python: Path, tests: list[str]) -> list[str]:
    """Passed, failed and skipped, as text."""
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=ROOT, check=False)
    suite = ET.parse(report).getroot().find("testsuite")
    count, failures, errors, skipped = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return [str(n) for n in (count - failed - skipped, failed, skipped)]


def main(tests: list[str]) -> int:
    rows = []
    for name in CELLS:
        python = install(name)
        rows.append([*installed(python), *run_tests(name, python, tests)])
    header = ["Python", *SHOWN, "passed", "failed", "skipped"]
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    return int(any(row[-2] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
