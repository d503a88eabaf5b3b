"""What the VAE makes of pictures, and the cache that makes it once."""

import pytest
import torch

from custom_diffusion.model.loading import load_models
from custom_diffusion.model.source import ModelSource
from custom_diffusion.training.latents import LatentEncoder


@pytest.fixture
def vae(tiny_model):
    return load_models(ModelSource(str(tiny_model)), torch.float32, torch.device("cpu"))[2]


def batch(*views, rendered=()):
    """Pictures and noise that follow from the view and from the place in the batch."""

    def draw(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    pixels = [draw(view, 3, 64, 64) for view in rendered]
    return {
        "views": list(views),
        "pixel_views": list(rendered),
        "pixel_values": torch.stack(pixels) if pixels else None,
        "posterior_noise": torch.stack([draw(100 + place, 4, 16, 16) for place in range(len(views))]),
    }


def test_the_cache_gives_what_the_vae_gives_and_lets_it_go(vae):
    plain, cached = LatentEncoder(vae, None), LatentEncoder(vae, 3)
    for views, rendered in (((1, 2), (1, 2)), ((2, 2), ()), ((2, 3), (2, 3)), ((3, 1), ())):
        expected = plain(batch(*views, rendered=views))
        assert torch.allclose(cached(batch(*views, rendered=rendered)), expected, rtol=1e-4, atol=1e-5)
        assert (cached.vae is None) == (3 in cached.cache)
    assert sum(moments.untyped_storage().nbytes() for moments in cached.cache.values()) == 3 * 2 * 4 * 16 * 16 * 4
