"""An image is the same pixels wherever it is read: transparency is white, and 16 bits are scaled to 8."""

from io import BytesIO

import launch
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_pictures

from custom_diffusion.cli.training_flags import parse_args
from custom_diffusion.images import open_image
from custom_diffusion.retrieval import pictures as retrieved
from custom_diffusion.training.augmentation import to_pixels
from custom_diffusion.training.samples import SampleSettings, TrainingSamples

SIZE = 64
HIDDEN = (200, 0, 0)  # a colour that a reader shows if it drops the transparency
SETTINGS = SampleSettings(
    seed=5, size=SIZE, latent_size=16, latent_channels=4, num_train_timesteps=1000, center_crop=True, hflip=False,
    augment=False,
)  # fmt: skip


def rgba(path):
    """Left half transparent, then a quarter that is half transparent black, then a quarter of opaque blue."""
    image = Image.new("RGBA", (SIZE, SIZE), (*HIDDEN, 0))
    image.paste((0, 0, 0, 128), (32, 0, 48, SIZE))
    image.paste((0, 0, 255, 255), (48, 0, SIZE, SIZE))
    image.save(path)
    return [(255, 255, 255), (127, 127, 127), (0, 0, 255)]


def grey_with_alpha(path):
    image = Image.new("LA", (SIZE, SIZE), (30, 0))
    image.paste((0, 128), (32, 0, 48, SIZE))
    image.paste((90, 255), (48, 0, SIZE, SIZE))
    image.save(path)
    return [(255, 255, 255), (127, 127, 127), (90, 90, 90)]


def palette_with_alpha(path):
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([*HIDDEN, 0, 0, 0, 0, 0, 255])
    image.paste(1, (32, 0, 48, SIZE))
    image.paste(2, (48, 0, SIZE, SIZE))
    image.save(path, transparency=bytes([0, 128, 255]))
    return [(255, 255, 255), (127, 127, 127), (0, 0, 255)]


def colour_key(path):
    """One colour of an RGB image means transparent."""
    image = Image.new("RGB", (SIZE, SIZE), HIDDEN)
    image.paste((1, 2, 3), (32, 0, 48, SIZE))
    image.paste((0, 0, 255), (48, 0, SIZE, SIZE))
    image.save(path, transparency=HIDDEN)
    return [(255, 255, 255), (1, 2, 3), (0, 0, 255)]


def sixteen_bits(path):
    values = np.zeros((SIZE, SIZE), np.uint16)
    values[:, :32], values[:, 32:48], values[:, 48:] = 300, 32896, 65535
    Image.fromarray(values).save(path)
    return [(1, 1, 1), (128, 128, 128), (255, 255, 255)]


KINDS = [rgba, grey_with_alpha, palette_with_alpha, colour_key, sixteen_bits]
parametrize_kinds = pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)


def three_parts(pixels):
    """Pixels (H, W, 3) in 0..255 from the middle of each part of the image."""
    return [tuple(int(value) for value in pixels[SIZE // 2, column]) for column in (16, 40, 56)]


@parametrize_kinds
def test_training_shows_photos_and_class_images_as_they_look(write, tmp_path):
    expected = write(tmp_path / "x.png")
    samples = TrainingSamples([(tmp_path / "x.png", "a cat")], [(tmp_path / "x.png", "cat")], SETTINGS)
    for pixels in samples[0, True]["pixel_values"]:  # (3, H, W) in [-1, 1]
        assert three_parts(((pixels + 1) * 127.5).round().permute(1, 2, 0)) == expected


@parametrize_kinds
def test_retrieval_keeps_the_pixels_that_training_shows(write, tmp_path):
    write(tmp_path / "x.png")
    file, fingerprint = retrieved.to_class_image((tmp_path / "x.png").read_bytes(), min_size=1)
    seen = open_image(tmp_path / "x.png")
    assert fingerprint == retrieved.pixel_hash(seen)
    with Image.open(BytesIO(file)) as kept:
        assert np.abs(np.asarray(kept, dtype=int) - np.asarray(seen, dtype=int)).mean() < 4  # JPEG


@parametrize_kinds
@pytest.mark.parametrize("where", ["photos", "class"])
def test_the_checks_take_them(write, where, run_arguments, tmp_path):
    folders = {"photos": make_pictures(tmp_path / "photos", 1), "class": make_pictures(tmp_path / "class", 7)}
    write(folders[where] / "x.png")
    flags = {"instance_data_dir": folders["photos"], "class_data_dir": folders["class"], "real_prior": False}
    _, (concept,) = parse_args(launch.flags(**run_arguments | flags | {"output_dir": tmp_path / "out"}))
    assert (folders[where] / "x.png" in concept.photos()) == (where == "photos")


@pytest.mark.parametrize("where", ["instance_data_dir", "class_data_dir"])
def test_floating_point_images_are_refused_by_the_checks(where, run_arguments, tmp_path, capsys):
    folder = make_pictures(tmp_path / "images", 7)
    Image.new("F", (SIZE, SIZE), 0.5).save(folder / "x.tif")
    flags = run_arguments | {where: folder, "real_prior": False, "output_dir": tmp_path / "out"}
    flags = {"class_data_dir": tmp_path / "class"} | flags
    with pytest.raises(SystemExit):
        parse_args(launch.flags(**flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train_custom_diffusion.py: error: --{where}: cannot read image '{folder / 'x.tif'}'")
    with pytest.raises(retrieved.Rejected):
        retrieved.to_class_image((folder / "x.tif").read_bytes(), min_size=1)


def test_an_image_turned_by_its_camera_is_upright_for_retrieval_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    (photo,) = make_pictures(tmp_path, 1, (80, 40)).iterdir()
    with Image.open(photo) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    seen = open_image(tmp_path / "turned.png")
    assert seen.size == (40, 80)
    _, fingerprint = retrieved.to_class_image((tmp_path / "turned.png").read_bytes(), min_size=1)
    assert fingerprint == retrieved.pixel_hash(seen)
    assert torch.equal(to_pixels(seen), to_pixels(open_image(photo).transpose(Image.Transpose.ROTATE_270)))
