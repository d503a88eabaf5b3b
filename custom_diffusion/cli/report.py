"""How every command tells what is wrong."""

import os
import sys


def exit_with_problems(program: str, problems) -> None:
    """Print one line per problem (from the first process of each machine only) and exit with status 2."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for problem in problems:
            print(f"{program}: error: {problem}", file=sys.stderr)
    raise SystemExit(2)
