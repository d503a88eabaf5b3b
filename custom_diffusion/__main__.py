"""The one door: `python -m custom_diffusion TOOL ...`, installed as `custom-diffusion`.

Every file in `tools/` is a tool. Its flags are read before anything heavy is imported, so `--help` and a wrong flag answer at
once.
"""

import argparse
import importlib
import pkgutil
import runpy

from custom_diffusion import tools
from custom_diffusion.cli.tool_flags import add_tool, run_tool


def main(argv: list[str] | None = None, program: str = "custom-diffusion") -> None:
    """Run the tool that the command line names. `program` is how this one was called, for messages."""
    modules = {
        name: importlib.import_module(f"{tools.__name__}.{name}")
        for name in sorted(module.name for module in pkgutil.iter_modules(tools.__path__))
    }
    parser = argparse.ArgumentParser(
        prog=program, description="What is done with a trained concept. TOOL --help says more."
    )
    subparsers = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, module in modules.items():
        add_tool(subparsers, name, module)
    args = parser.parse_args(argv)
    run_tool(f"{program} {args.tool}", modules[args.tool], args)


def train() -> None:
    """`custom-diffusion-train`: the training script, for those who have no checkout."""
    runpy.run_module("train_custom_diffusion", run_name="__main__", alter_sys=True)


def retrieve() -> None:
    """`custom-diffusion-retrieve`: the class-image script, for those who have no checkout."""
    runpy.run_module("retrieve", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(program="python -m custom_diffusion")
