"""What is said when something cannot work, or may not be what was meant."""

import sys


class InputError(ValueError):
    """Something the user gave cannot work. `problems` are lines that name the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warn(line: str) -> None:
    """One line on stderr."""
    print(f"warning: {line}", file=sys.stderr)
