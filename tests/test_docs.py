"""The documentation keeps up with the code: flags, defaults, tools, functions, links, and the commands that it shows."""

import ast
import pkgutil
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from launch import ROOT

import custom_diffusion
from custom_diffusion import tools
from custom_diffusion.cli.training_flags import build_parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted(module.name for module in pkgutil.iter_modules(tools.__path__))
TRAINING, RETRIEVAL = "train_custom_diffusion.py", "retrieve.py"
PAGE_OF = {TRAINING: "flags.md", RETRIEVAL: "class_images.md"} | dict.fromkeys(TOOLS, "tools.md")
# What starts one of our commands in a shell: the program, then its flags.
COMMAND = re.compile(
    rf"(?:python|accelerate launch.*?) (?P<script>{re.escape(TRAINING)}|{re.escape(RETRIEVAL)})(?P<flags> .*|$)"
    r"|(?:python -m custom_diffusion|(?<![\w/.-])custom-diffusion) (?P<tool>[\w.]+)(?P<tool_flags> .*|$)"
)


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that `--help` of a script or tool lists, `--help` itself aside."""
    words = [command] if command.endswith(".py") else ["-m", "custom_diffusion", command]
    result = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return frozenset(re.findall(r"^ +(?:-\w, )?(--\w+)", result.stdout, re.MULTILINE)) - {"--help"}


def section(text: str, heading: str) -> str:
    """The part of a page below a heading, up to the next one of its level."""
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section '## {heading}'; add it"
    return found.group(1)


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_commands(page: Path) -> list[str]:
    """Every command line of the page's shell blocks, continued lines joined and comments removed."""
    lines = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("command", PAGE_OF)
def test_every_flag_has_a_row(command):
    text = (ROOT / "docs" / PAGE_OF[command]).read_text(encoding="utf-8")
    if command in TOOLS:
        text = section(text, {"share": "Sharing"}.get(command, command))
    documented = {flag for cells in table_rows(text) for flag in re.findall(r"--\w+", cells[0])}
    assert flags_of(command) <= documented


def test_no_row_is_about_a_flag_that_is_gone():
    for page in set(PAGE_OF.values()):
        flags = frozenset().union(*(flags_of(command) for command, its_page in PAGE_OF.items() if its_page == page))
        for cells in table_rows((ROOT / "docs" / page).read_text(encoding="utf-8")):
            if cells[0].startswith("`--"):
                assert set(re.findall(r"--\w+", cells[0])) <= flags, f"{page}: {cells[0]}"


def test_defaults_of_training():
    rows = table_rows((ROOT / "docs/flags.md").read_text(encoding="utf-8"))
    said = {cells[0].strip("`-"): cells[1].strip("`") for cells in rows if cells[0].startswith("`--")}
    for action in build_parser()._actions:
        if action.dest == "help":
            continue
        cell, default = said[action.dest], action.default
        if action.required:
            assert cell == "required", action.dest
        elif default is False:
            assert cell == "off", action.dest
        elif default is None:
            assert cell != "off" and not re.fullmatch(r"[\d.e-]+", cell), action.dest
        else:
            assert type(default)(cell) == default, action.dest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What can follow `#`: headings as GitHub spells them, and anchors of our own."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tools_exist(page):
    text = page.read_text(encoding="utf-8")
    assert "-m custom_diffusion." not in text  # the tools have one door
    for match in re.finditer(r"(?:python -m custom_diffusion|(?<![\w/.-])custom-diffusion) (\w+)", text):
        assert match.group(1) in [*TOOLS, "TOOL"], f"{page.name}: {match.group()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_only_flags_that_exist(page):
    for line in shell_commands(page):
        match = COMMAND.search(line)
        if match is None or match["tool"] == "TOOL":
            continue
        command = match["script"] or match["tool"]
        flags = re.findall(r"(?<= )--\w+", match["flags"] or match["tool_flags"] or "")
        assert set(flags) <= flags_of(command), f"{page.name}: {line}"


def test_the_guide_commands_parse():
    """Every training command of the README, as argparse sees it."""
    commands = [COMMAND.search(line)["flags"] for line in shell_commands(ROOT / "README.md") if TRAINING in line]
    assert len(commands) == 3  # the cat, several concepts, faces
    for flags in commands:
        args = build_parser().parse_args(shlex.split(flags))
        assert args.real_prior and args.scale_lr and args.modifier_token


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_exist(page):
    for path in re.findall(r"python ((?:\w+/)*\w+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_imports_what_is_there(page):
    for code in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "custom_diffusion":
                assert {alias.name for alias in node.names} <= set(dir(custom_diffusion))
