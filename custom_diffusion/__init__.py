"""Custom Diffusion: teach a Stable Diffusion model a new concept from 4-20 photos.

`load_custom_diffusion(pipe, weights)` puts a trained concept into a diffusers pipeline and `unload_custom_diffusion(pipe)`
takes it out again; `read_weights(path_or_hub_id)` reads one without a pipeline. Every tool of the command line is a function
of the same name and defaults: `generate`, `evaluate`, `merge`, `compress`, `export`, `info`, `memory`, `share`.
"""

import importlib
import pkgutil

_PLACES = {
    "load_custom_diffusion": "custom_diffusion.weights.pipeline",
    "unload_custom_diffusion": "custom_diffusion.weights.pipeline",
    "read_weights": "custom_diffusion.weights.format",
}
__version__ = "0.1.0"


def _places():
    """Public name -> the module that it is in. A tool is the function of its file's name."""
    tools = importlib.import_module("custom_diffusion.tools")
    return _PLACES | {module.name: f"{tools.__name__}.{module.name}" for module in pkgutil.iter_modules(tools.__path__)}


def __getattr__(name):
    # torch and diffusers take seconds to import; `--help` of every command must not wait for them.
    if name == "__all__":
        return list(_places())
    if not name.startswith("_") and name in (places := _places()):
        return getattr(importlib.import_module(places[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *_places()]
