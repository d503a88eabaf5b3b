"""The versions of libraries below which a run would not fail but go wrong.

Imports nothing heavy, and reads versions without importing what has them.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST_DIFFUSERS = "0.33"


def version_problems() -> list[str]:
    """A line if the installed diffusers is too old. pip sees to the rest, which fails openly or not at all."""
    try:
        found = version("diffusers")
    except PackageNotFoundError:  # the import is about to say so
        return []
    if Version(found) >= Version(OLDEST_DIFFUSERS):
        return []
    return [
        f"diffusers {found} is installed, which loads weights to be trained in bf16 already rounded; "
        f"install {OLDEST_DIFFUSERS} or newer: pip install -r requirements.txt"
    ]
