"""How every command tells what is wrong."""

import sys

from custom_diffusion.cli.launcher import speaks_for_machine


def exit_with_problems(program: str, problems) -> None:
    """Print one line per problem, of those that all processes of a machine have only once, and exit with status 2."""
    if speaks_for_machine():
        for problem in problems:
            print(f"{program}: error: {problem}", file=sys.stderr)
    raise SystemExit(2)
