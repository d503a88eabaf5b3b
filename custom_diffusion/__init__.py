"""Custom Diffusion: teach a Stable Diffusion model a new concept from 4-20 photos.

`load_custom_diffusion(pipe, path_or_hub_id)` puts a trained concept into a diffusers pipeline and
`unload_custom_diffusion(pipe)` takes it out again.
"""

__all__ = ["load_custom_diffusion", "unload_custom_diffusion"]
__version__ = "0.1.0"


def __getattr__(name):
    # torch and diffusers take seconds to import; `--help` of every command must not wait for them.
    if name in __all__:
        from custom_diffusion import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
