"""Augmentation, masks, crops, and the sequence of samples, against cases computed by hand."""

import copy
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_pictures

from custom_diffusion.images import open_image
from custom_diffusion.training.augmentation import (
    PROMPT_PREFIXES,
    Augmentation,
    draw_augmentation,
    draw_class_crop,
    photo_mask,
    render_class_image,
    render_photo,
    shrink_to,
)
from custom_diffusion.training.samples import Progress, SampleSettings, TrainingBatches, TrainingSamples, collate

SETTINGS = SampleSettings(
    seed=5, size=64, latent_size=16, latent_channels=4, num_train_timesteps=1000, center_crop=False, hflip=True,
    augment=True,
)  # fmt: skip


def class_image_of(image, rng, size, *, center_crop, flip):
    return render_class_image(image, draw_class_crop(rng, *image.size, size, center_crop=center_crop, flip=flip), size)


def shown(scale, left, top, size=(100, 100), padded=True):
    return Augmentation(False, (0, 0, *size), scale, left, top, "", padded)


@pytest.mark.parametrize(
    ("scale", "left", "top", "rows", "columns"),
    [
        (512, 0, 0, (1, 63), (1, 63)),  # whole canvas: the border still goes
        (256, 0, 0, (1, 31), (1, 31)),
        (256, 128, 256, (33, 63), (17, 47)),
        (171, 13, 100, (13, 32), (2, 22)),  # 100 // 8 + 1, (100 + 171) // 8 - 1; 13 // 8 + 1, (13 + 171) // 8 - 1
    ],
)
def test_mask_of_a_pasted_photo(scale, left, top, rows, columns):
    mask = photo_mask(shown(scale, left, top), 512, 64)
    expected = torch.zeros(1, 64, 64)
    expected[:, slice(*rows), slice(*columns)] = 1
    assert torch.equal(mask, expected)


def test_mask_is_full_without_padding():
    assert photo_mask(shown(700, 5, 5, padded=False), 512, 64).all()


@pytest.mark.parametrize(("left", "top", "row", "column"), [(43, 43, 6, 6), (8, 40, 6, 2), (40, 8, 2, 6)])
def test_mask_is_never_empty(left, top, row, column):
    mask = photo_mask(shown(21, left, top), 64, 8)  # 21 pixels at factor 8: all border, or nearly
    assert mask.sum() == 1
    assert mask[0, row, column] == 1


def test_small_photo_is_pasted_on_grey():
    photo = Image.new("RGB", (100, 100), (255, 255, 255))
    pixels = render_photo(photo, shown(16, 20, 30), 64)
    expected = torch.zeros(3, 64, 64)
    expected[:, 30:46, 20:36] = 1
    assert torch.equal(pixels, expected)


def test_large_photo_is_cut():
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, :, None], (80, 80, 3))
    pixels = render_photo(Image.fromarray(ramp.copy()), shown(80, 10, 3, size=(80, 80), padded=False), 64)
    assert torch.allclose((pixels[0, 0] + 1) * 127.5, torch.arange(10.0, 74.0))


def test_edges_are_not_sharpened():
    """Bilinear, not bicubic: no value beyond those of the photo."""
    photo = Image.new("L", (100, 100), 100)
    photo.paste(150, (47, 0, 100, 100))
    photo = photo.convert("RGB")
    shown_photo = render_photo(photo, shown(64, 0, 0), 64)
    class_image = class_image_of(photo, np.random.default_rng(0), 64, center_crop=True, flip=False)
    for pixels in (shown_photo, class_image):
        levels = (pixels + 1) * 127.5
        assert levels.min() > 99.9 and levels.max() < 150.1 and len(levels[0, 0].unique()) > 2


def test_flip_mirrors_after_the_crop():
    photo = Image.new("RGB", (120, 60))
    photo.paste((255, 255, 255), (30, 0, 60, 60))  # left half of the centred square
    flipped = Augmentation(True, (30, 0, 90, 60), 64, 0, 0, "", False)
    pixels = render_photo(photo, flipped, 64)
    assert pixels[:, :, :30].max() == -1
    assert pixels[:, :, 34:].min() == 1


def test_distribution_of_augmentations():
    rng = np.random.default_rng(0)
    draws = [draw_augmentation(rng, 300, 200, 512, center_crop=False, hflip=True, augment=True) for _ in range(6000)]
    small = [a for a in draws if a.scale <= 512]
    assert len(small) / len(draws) == pytest.approx(0.66, abs=0.02)
    assert min(a.scale for a in small) == 170
    assert max(a.scale for a in small) == 512
    large = [a.scale for a in draws if a.scale > 512]
    assert (min(large), max(large)) == (614, 715)  # int(1.2 * 512) to int(1.4 * 512) - 1
    assert np.mean([a.flip for a in draws]) == pytest.approx(0.5, abs=0.03)
    for a in draws:
        assert a.padded is (a.scale <= 512)
        far = a.scale < 0.6 * 512
        near = a.scale > 512
        assert (a.prefix in ("a far away ", "very small ")) == far
        assert (a.prefix in ("zoomed in ", "close up ")) == near
        assert a.prefix or not (far or near)
        assert 0 <= a.left <= abs(512 - a.scale)
        assert 0 <= a.top <= abs(512 - a.scale)
        left, top, right, bottom = a.crop
        assert right - left == bottom - top == 200
        assert 0 <= left <= 100
        assert top == 0
    assert {a.crop[0] for a in draws} == set(range(101))
    assert len({a.prefix for a in draws}) == 5
    assert {a.prefix for a in draws} == set(PROMPT_PREFIXES)  # every form in which the tokenizer must take a prompt


def test_without_augmentation():
    rng = np.random.default_rng(0)
    a = draw_augmentation(rng, 90, 70, 64, center_crop=True, hflip=False, augment=False)
    assert a == Augmentation(False, (10, 0, 80, 70), 64, 0, 0, "", padded=False)
    a = draw_augmentation(rng, 71, 92, 64, center_crop=True, hflip=False, augment=False)
    assert str(a.crop) == "(0, 10, 71, 81)"  # whole pixels


def test_pictures_are_upright(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    name = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (30, 30)).save(name)
    assert open_image(name).mode == "RGB"


def test_class_images_keep_their_shape():
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (64, 128, 3))
    pixels = class_image_of(Image.fromarray(ramp.copy()), np.random.default_rng(0), 64, center_crop=True, flip=False)
    assert torch.allclose((pixels[0, 0] + 1) * 127.5, torch.arange(32.0, 96.0))
    mirrored = class_image_of(Image.fromarray(ramp.copy()), np.random.default_rng(0), 64, center_crop=True, flip=True)
    assert torch.equal(mirrored, pixels.flip(2))


@pytest.mark.parametrize("pool_size", [None, 4])
def test_class_images_are_mirrored_at_half_of_the_positions(pool_size, tmp_path):
    photos = [(p, "a cat") for p in make_pictures(tmp_path / "a", 1).iterdir()]
    classes = [(p, "cat") for p in make_pictures(tmp_path / "b", 1, (64, 64), seed=2).iterdir()]
    plain = class_image_of(open_image(classes[0][0]), np.random.default_rng(0), 64, center_crop=True, flip=False)
    settings = replace(SETTINGS, center_crop=True, pool_size=pool_size)
    count = 200
    flipped = TrainingSamples(photos, classes, settings)
    shown = [flipped[position, True]["pixel_values"][1] for position in range(count)]
    as_it_is = sum(torch.equal(pixels, plain) for pixels in shown)
    mirrored = sum(torch.equal(pixels, plain.flip(2)) for pixels in shown)
    assert as_it_is + mirrored == count
    assert 0.35 * count < mirrored < 0.65 * count
    never = TrainingSamples(photos, classes, replace(settings, hflip=False))
    assert all(torch.equal(never[position, True]["pixel_values"][1], plain) for position in range(20))


@pytest.fixture
def samples(tmp_path):
    photos = [(p, "a <new1> cat") for p in sorted(make_pictures(tmp_path / "a", 3).iterdir())]
    classes = [(p, p.stem) for p in sorted(make_pictures(tmp_path / "b", 7, seed=2).iterdir())]
    return TrainingSamples(photos, classes, SETTINGS)


def test_an_epoch_pairs_every_index_once(samples):
    for epoch in range(3):
        pairs = [samples.indices(position) for position in range(7 * epoch, 7 * (epoch + 1))]
        assert sorted(pairs, key=lambda pair: pair[1]) == [(i % 3, i % 7) for i in range(7)]
    assert [samples.indices(i) for i in range(7)] != [samples.indices(i) for i in range(7, 14)]


def test_a_sample_depends_on_its_position_only(samples):
    first = samples[11, True]
    for position in (3, 200):
        samples[position, True]
    again = samples[11, True]
    assert first["prompts"] == again["prompts"]
    for key in ("pixel_values", "mask", "timesteps", "noise", "posterior_noise"):
        assert torch.equal(first[key], again[key])
        assert key == "mask" or not torch.equal(first[key], samples[12, True][key])


def test_a_pool_changes_nothing_where_no_picture_is_random(tmp_path):
    """`--cache_latents` with `--noaug`, square pictures and no `--hflip`."""
    photos = [(p, "a <new1> cat") for p in sorted(make_pictures(tmp_path / "a", 3, (70, 70)).iterdir())]
    classes = [(p, p.stem) for p in sorted(make_pictures(tmp_path / "b", 7, (80, 80), seed=2).iterdir())]
    settings = replace(SETTINGS, hflip=False, augment=False)
    without, pool = (TrainingSamples(photos, classes, replace(settings, pool_size=size)) for size in (None, 4))
    for position in range(14):
        one, other = without[position, True], pool[position, True]
        assert one["prompts"] == other["prompts"]
        for key in ("pixel_values", "mask", "timesteps", "noise", "posterior_noise"):
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulation"), [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]
)
def test_any_division_of_a_step_sees_the_same_samples(samples, num_workers, processes, batch_size, accumulation):
    """With all that any family is told of an image."""
    samples = copy.copy(samples)
    samples.settings = replace(samples.settings, inpainting=True)
    names = ("noise", "pixel_values", "timesteps", "posterior_noise", "time_ids", "holes", "hole_noise")

    def rows(batch):
        return {
            tuple(torch.cat([batch[name][i].flatten() for name in names]).tolist()) for i in range(len(batch["noise"]))
        }

    seen = set()
    for process in range(processes):
        progress = Progress(step=2, position=8)
        batches = []
        for batch in TrainingBatches(
            samples, progress, 4, num_workers=num_workers, pin_memory=False, batch_size=batch_size,
            accumulation=accumulation, process_index=process, num_processes=processes,
        ):  # fmt: skip
            batches.append(batch)
            if len(batches) % accumulation == 0:
                progress.step += 1
        assert len(batches) == 2 * accumulation
        seen = seen.union(*map(rows, batches))
    assert seen == rows(collate([samples[position, True] for position in range(8, 16)])) and len(seen) == 16


def test_batches_list_photos_before_class_images(samples):
    batch = collate([samples[position, True] for position in (0, 1)])
    alone = [samples[position, True] for position in (0, 1)]
    assert batch["prompts"] == [
        alone[0]["prompts"][0],
        alone[1]["prompts"][0],
        alone[0]["prompts"][1],
        alone[1]["prompts"][1],
    ]
    assert torch.equal(batch["pixel_values"][3], alone[1]["pixel_values"][1])
    assert batch["mask"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("pool_size", [None, 3])
def test_class_images_are_mirrored_half_of_the_time_and_only_with_hflip(samples, pool_size):
    samples.settings = replace(SETTINGS, pool_size=pool_size)
    flips = [samples.views(position)[1].flip for position in range(200)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)
    position = flips.index(True)
    mirrored = samples[position, True]["pixel_values"]
    samples.settings = replace(SETTINGS, pool_size=pool_size, hflip=False, augment=False)
    assert not any(view.flip for position in range(50) for view in samples.views(position))
    plain = samples[position, True]["pixel_values"]
    assert torch.equal(mirrored[1], plain[1].flip(2))


def test_a_pool_holds_so_many_augmentations_of_each_photo_and_one_crop_of_each_class_image(samples):
    samples.settings = replace(SETTINGS, pool_size=2)
    shown = {}
    for position in range(60):
        sample = samples[position, True]
        photo, class_image = sample["views"]
        for view, tensors in (
            (photo, [sample["pixel_values"][0], sample["mask"]]),
            (class_image, [sample["pixel_values"][1]]),
        ):
            assert all(map(torch.equal, shown.setdefault(view, tensors), tensors))
    photos = {view[:3] for view in shown if view.purpose == photo.purpose}
    assert sorted(view[1:] for view in photos) == [(index, draw) for index in range(3) for draw in range(2)]
    assert sorted((view.index, view.draw, view.flip) for view in shown if view[:3] not in photos) == [
        (index, 0, flip) for index in range(7) for flip in (False, True)
    ]


def test_a_class_image_of_several_concepts_is_in_the_pool_once(tmp_path):
    """Each concept has its own caption for it, and all show the same crop."""
    Image.effect_noise((200, 100), 80).convert("RGB").save(tmp_path / "noise.png")
    settings = replace(SETTINGS, pool_size=1, hflip=False)
    class_images = [(tmp_path / "noise.png", caption) for caption in ("a cat", "an animal", "a pet")]
    samples = TrainingSamples([(tmp_path / "noise.png", "a <new1> cat")], class_images, settings)
    shown = [samples[position, True] for position in range(3)]
    assert {sample["prompts"][1] for sample in shown} == {"a cat", "an animal", "a pet"}
    assert len({sample["views"][1] for sample in shown}) == 1
    first, *others = (torch.cat([s["pixel_values"][1].flatten(), s["time_ids"][1]]) for s in shown)
    assert all(torch.equal(first, other) for other in others)


def test_timesteps_and_noise(samples):
    samples.settings = replace(SETTINGS, num_train_timesteps=3, latent_channels=5)
    drawn = [samples[position, False] for position in range(40)]
    assert all(sample["pixel_values"] is None for sample in drawn)
    assert {int(t) for sample in drawn for t in sample["timesteps"]} == {0, 1, 2}
    noise, posterior = (torch.stack([sample[key] for sample in drawn]) for key in ("noise", "posterior_noise"))
    for values in (noise, posterior):
        assert values.shape == (40, 2, 5, 16, 16) and values.dtype == torch.float32
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs((noise * posterior).mean()) < 0.02  # independent, as are photo and class image
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 0.02


def test_photos_are_kept_no_larger_than_an_augmentation_needs_and_never_enlarged(tmp_path):
    for size in ((300, 200), (40, 30)):
        (photo,) = make_pictures(tmp_path / str(size), 1, size).iterdir()
        kept, _ = TrainingSamples([(photo, "a cat")], [], SETTINGS).photos[0]
        assert kept.size == ((134, 89) if size == (300, 200) else (40, 30))  # 1.4 * 64 = 89.6 at most


def test_without_class_images_a_sample_is_a_photo(tmp_path):
    photos = [(p, "a <new1> cat") for p in sorted(make_pictures(tmp_path, 3).iterdir())]
    samples = TrainingSamples(photos, [], SETTINGS)
    assert sorted(samples.indices(position) for position in range(3)) == [(0, None), (1, None), (2, None)]
    batch = collate([samples[position, True] for position in range(2)])
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["noise"].shape == (2, 4, 16, 16)
    assert batch["timesteps"].shape == (2,)


def batches_of(samples, progress, max_train_steps, **plan):
    plan = {"batch_size": 2, "accumulation": 1, "process_index": 0, "num_processes": 1} | plan
    return TrainingBatches(samples, progress, max_train_steps, num_workers=0, pin_memory=False, **plan)


def test_a_view_of_a_pool_is_rendered_the_first_time_only(samples):
    samples.settings = replace(SETTINGS, pool_size=2)
    progress, rendered, shown = Progress(0, 0), [], set()
    batches = batches_of(samples, progress, 20)
    for batch in batches:
        shown.update(batch["views"])
        assert shown.issuperset(batch["pixel_views"])
        rendered += batch["pixel_views"]
        assert shown.issubset(rendered)  # nothing is shown that was not rendered before
        if batch["pixel_values"] is not None:
            assert len(batch["pixel_values"]) == len(batch["pixel_views"])
        progress.step += 1
    assert progress.step == 20
    assert len(shown) == batches.num_views < 40  # of 2 x 2 x 20
    assert len(rendered) < 60


def test_samples_with_and_without_pixels_in_one_batch(samples):
    alone = [samples[0, False], samples[1, True], samples[2, True]]
    batch = collate(alone)
    assert batch["pixel_views"] == [
        alone[1]["views"][0],
        alone[2]["views"][0],
        alone[1]["views"][1],
        alone[2]["views"][1],
    ]
    assert torch.equal(batch["pixel_values"][1], alone[2]["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][2], alone[1]["pixel_values"][1])
    for key in ("timesteps", "noise", "posterior_noise"):
        assert torch.equal(batch[key], torch.stack([s[key][n] for n in range(2) for s in alone]))
    assert torch.equal(batch["mask"], torch.stack([s["mask"] for s in alone]))
    assert batch["views"] == [s["views"][n] for n in range(2) for s in alone]
    assert collate([samples[0, False]])["pixel_values"] is None


def test_skipped_steps_are_made_up_for_with_further_samples(samples):
    progress, seen = Progress(step=1, position=6), []
    for number, batch in enumerate(batches_of(samples, progress, 4)):
        seen.append(batch["noise"])
        progress.position += 2
        progress.step += number not in (0, 3)  # two overflow
    expected = [collate([samples[p, True], samples[p + 1, True]])["noise"] for p in range(6, 16, 2)]
    assert len(seen) == 5 and all(torch.equal(a, b) for a, b in zip(seen, expected))


def test_nothing_is_left_to_do_at_the_last_step(samples):
    batches = batches_of(samples, Progress(step=9, position=18), 4)
    assert list(batches) == [] and batches.num_views == 0


@pytest.mark.parametrize(
    ("size", "result"), [((120, 60), (128, 64)), ((64, 200), (64, 200)), ((61, 30), (130, 64)), ((32, 50), (64, 100))]
)
def test_class_images_get_the_size_on_their_shorter_side(size, result):
    assert shrink_to(Image.new("RGB", size), 64, enlarge=True).size == result


def test_small_class_images_fill_the_canvas():
    white = Image.new("RGB", (40, 30), (255, 255, 255))
    pixels = class_image_of(white, np.random.default_rng(0), 64, center_crop=False, flip=False)
    assert torch.equal(pixels, torch.ones(3, 64, 64))


def test_class_images_are_cut_anywhere_but_in_their_middle_with_center_crop():
    ramp = np.broadcast_to(np.arange(103, dtype=np.uint8)[:, None, None], (103, 64, 3))
    image, rng = Image.fromarray(ramp.copy()), np.random.default_rng(0)
    tops = {
        round(float((class_image_of(image, rng, 64, center_crop=False, flip=False)[0, 0, 0] + 1) * 127.5))
        for _ in range(400)
    }
    assert tops == set(range(40))
    centred = class_image_of(image, rng, 64, center_crop=True, flip=False)
    assert round(float((centred[0, 0, 0] + 1) * 127.5)) == 19


def test_class_images_come_with_their_own_caption(samples):
    for position in range(7):
        sample = samples[position, True]
        (path, caption), view = samples.class_images[sample["views"][1].index], sample["views"][1]
        assert sample["prompts"][1] == caption == path.stem
        assert sample["prompts"][0].endswith("a <new1> cat")
        expected = shrink_to(open_image(path), 64, enlarge=True).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        shown_mean = ((sample["pixel_values"][1].mean(dim=(1, 2)) + 1) * 127.5).tolist()
        assert np.allclose(shown_mean, expected, atol=25), view  # but for the crop


def test_center_crop_without_augmentation_shows_each_image_in_one_way(samples):
    samples.settings = replace(SETTINGS, center_crop=True, augment=False, hflip=False)
    seen = {}
    for position in range(21):
        sample = samples[position, True]
        for view, pixels in zip(sample["views"], sample["pixel_values"]):
            assert torch.equal(seen.setdefault((view.purpose, view.index), pixels), pixels)
    assert len(seen) == 3 + 7


class SignalsOfWorkers(TrainingSamples):
    """Its prompts say which signals the process that makes them ignores."""

    def __getitem__(self, item):
        ignored = [
            number.name for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) == signal.SIG_IGN
        ]
        return super().__getitem__(item) | {"prompts": [" ".join(ignored)] * 2}


def test_workers_leave_signals_to_the_main_process(samples):
    probe = SignalsOfWorkers([], samples.class_images, SETTINGS)
    probe.photos, probe.photo_sizes = samples.photos, samples.photo_sizes
    batches = TrainingBatches(
        probe, Progress(0, 0), 1, num_workers=1, pin_memory=False, batch_size=1, accumulation=1, process_index=0,
        num_processes=1,
    )  # fmt: skip
    assert next(iter(batches))["prompts"] == ["SIGINT SIGTERM"] * 2


def test_the_sequence_of_samples_is_that_of_earlier_versions(samples):
    """Else a run that an earlier version began would be resumed with other samples."""
    indices = [(1, 1), (1, 4), (2, 2), (0, 3), (0, 6), (2, 5), (0, 0), (1, 4), (0, 0)]  # the second epoch from 7 on
    assert [samples.indices(position) for position in range(9)] == indices
    sample = samples[11, False]
    assert sample["prompts"] == ["a far away a <new1> cat", "1"] and sample["mask"].sum() == 16
    assert sample["timesteps"].tolist() == [885, 501]
    assert sample["noise"].flatten()[:2].tolist() == pytest.approx([1.5409, -0.6418], abs=1e-4)
    assert sample["posterior_noise"].flatten()[:2].tolist() == pytest.approx([0.9171, -1.6914], abs=1e-4)
    samples.settings = replace(SETTINGS, pool_size=5)
    pool = [[(view.draw, view.flip) for view in samples.views(position)] for position in range(4)]
    assert pool == [[(draw, False), (0, flip)] for draw, flip in ((3, False), (1, False), (2, False), (2, True))]


@pytest.mark.parametrize("pool_size", [None, 4])
def test_time_ids_say_how_each_image_is_shown(pool_size, tmp_path):
    """Read off the pixels: in these images every column tells its place in the file."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "ramp.png")
    files = [(tmp_path / "ramp.png", "a cat")]
    samples = TrainingSamples(files, files, replace(SETTINGS, pool_size=pool_size))
    kinds = set()
    for position in range(60):
        sample = samples[position, True]
        shown_photo = samples._augmentation(sample["views"][0])[0]
        assert torch.equal(samples[position, False]["time_ids"], sample["time_ids"])
        pasted = shown_photo.scale if shown_photo.scale < 64 else None
        places = [(shown_photo.scale, shown_photo.flip, shown_photo.left if pasted else 0, pasted or 64)]
        places.append((64, sample["views"][1].flip, 0, 64))
        for (side, flip, start, width), time_ids, pixels in zip(places, sample["time_ids"], sample["pixel_values"]):
            height, full_width, top, left, *target = time_ids.tolist()
            assert (height, full_width, *target) == (100, 200, 64, 64) and min(top, left) >= 0
            row = shown_photo.top if pasted and side == pasted else 0
            seen = (pixels[0, row + 1, start + 2 : start + width - 2] + 1) * 127.5
            place = (left + torch.arange(2, width - 2) + 0.5) * 100 / side - 0.5  # in the file, or in its mirror
            assert (seen - (199 - place if flip else place)).abs().max() < 2.5
            kinds.add((side == 64, bool(pasted), flip))
    assert len(kinds) >= 5


def test_time_ids_are_in_the_order_of_the_batch_and_new_processes_know_sizes(tmp_path):
    wide, tall = (make_pictures(tmp_path / name, 1, size, seed=1) for name, size in (("a", (120, 60)), ("b", (50, 80))))
    samples = TrainingSamples(
        [(next(wide.iterdir()), "a cat")], [(next(tall.iterdir()), "cat")], replace(SETTINGS, pool_size=2)
    )
    batch = collate([samples[0, False], samples[1, False]])  # never rendered in this process
    assert batch["time_ids"].dtype == torch.float32
    assert batch["time_ids"][:, :2].tolist() == [[60, 120], [60, 120], [80, 50], [80, 50]]
