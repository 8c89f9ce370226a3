"""Pictures of every kind and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from llada2_mlx.checkpoint.sizes import ImageSizes
from llada2_mlx.errors import RequestError
from llada2_mlx.imaging.pixels import to_images
from llada2_mlx.imaging.prepare import (
    Purpose,
    centre_crop,
    edit_size,
    own_side,
    prepare,
    prepare_for,
    side_or_own,
    to_rgb,
    understand_size,
)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((300, 200), (288, 192)),
        ((16, 16), (128, 128)),  # scaled up to the smallest area
        ((1, 1), (128, 128)),
        ((4000, 3000), (896, 672)),  # scaled down to the largest
        ((800, 800), (800, 800)),
        ((48, 400), (64, 384)),  # 1.5 rounds to the even 2, 12.5 to 12
    ],
)
def test_the_size_to_understand_at(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert understand_size(*size) == target


@pytest.mark.parametrize(
    ("size", "target"),
    [((1000, 1000), (512, 512)), ((1600, 900), (672, 384)), ((400, 100), (1024, 256)), ((1, 9000), (256, 1024))],
)
def test_the_size_to_edit_at(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert edit_size(*size) == target


def test_editing_scales_the_picture_and_as_published_does_not() -> None:
    photo = Image.new("RGB", (2000, 2000), "red")
    photo.paste("blue", (744, 744, 1256, 1256))  # the middle 512 x 512
    scaled, cropped = (np.array(prepare(photo, purpose)) for purpose in (Purpose.EDIT, Purpose.EDIT_PUBLISHED))
    assert (cropped == (0, 0, 255)).all()
    assert (scaled[0, 0] == (255, 0, 0)).all() and (scaled[256, 256] == (0, 0, 255)).all()
    assert np.mean((scaled == (0, 0, 255)).all(-1)) == pytest.approx(0.256**2, rel=0.05)


def test_a_small_picture_is_padded_as_published_and_fills_otherwise() -> None:
    small = Image.new("RGB", (64, 64), "red")
    published, ours = (np.array(prepare(small, purpose)) for purpose in (Purpose.EDIT_PUBLISHED, Purpose.EDIT))
    assert (published[:64, :64] == (255, 0, 0)).all() and not published[64:].any() and not published[:, 64:].any()
    assert ours.shape == (512, 512, 3) and (ours == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("size", "crop"),
    [((720, 500), (736, 512)), ((750, 500), (768, 512)), ((500, 720), (512, 736)), ((704, 500), (704, 512))],
)
def test_a_crop_that_comes_out_larger_than_its_target(size: tuple[int, int], crop: tuple[int, int]) -> None:
    # 720 x 500 has the target 704 x 512; covering it takes 737 x 512, and the published crop keeps every whole step of that
    prepared = prepare(noise(*size), Purpose.UNDERSTAND)
    assert prepared.size == crop
    scaled = noise(*size).resize([round(side * max(512 / 500, 704 / 720)) for side in size], Image.Resampling.BICUBIC)
    assert prepared.tobytes() == centre_crop(scaled, *crop).tobytes()


@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode(mode: str, purpose: Purpose) -> None:
    image = Image.new("RGB", (200, 160), "white").convert(mode if mode not in ("I;16", "I", "F") else "L")
    if mode == "I;16":
        image = Image.fromarray(np.full((160, 200), 65535, np.uint16))
    elif mode in ("I", "F"):
        image = image.convert(mode)
    prepared = prepare(image, purpose)
    assert prepared.mode == "RGB"
    assert np.array(prepared)[8, 8].min() >= 250


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 100, 200))
    image.paste((0, 0, 0, 128), (0, 0, 10, 10))
    rgb = np.array(to_rgb(image))
    assert (rgb[150, 150] == 255).all() and (rgb[150, 50] == (255, 0, 0)).all()
    assert rgb[5, 5] == pytest.approx([127] * 3, abs=1)
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((150, 150))
    assert (np.array(to_rgb(palette))[150, 150] == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    for image in (
        Image.fromarray(ramp),
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray(ramp.astype(np.float32)),
    ):
        assert np.array(to_rgb(image))[0, :, 0] == pytest.approx(np.arange(256), abs=1)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(RequestError, match="0 x 40 pixels: there is nothing in it"):
        prepare(Image.new("RGB", (0, 40)), Purpose.UNDERSTAND)


@pytest.mark.parametrize("size", [(100, 1000), (2000, 60), (128, 5000)])
def test_a_thin_picture_is_refused_with_its_grid(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=rf"{size[0]} x {size[1]} pixels, too thin .* codes"):
        prepare(Image.new("RGB", size), Purpose.UNDERSTAND)
    prepare(Image.new("RGB", size), Purpose.EDIT)  # has one of a fixed set of sizes


def test_an_off_centre_crop_takes_the_middle() -> None:
    assert centre_crop(noise(100, 50), 40, 20).tobytes() == noise(100, 50).crop((30, 15, 70, 35)).tobytes()


def test_tensors_become_pictures() -> None:
    batch = torch.rand(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    images = to_images(batch)
    assert [image.size for image in images] == [(7, 5)] * 2
    assert np.array(images[1]) / 255 == pytest.approx(batch[1].numpy(), abs=0.5 / 255 + 1e-6)
    assert to_images(batch[..., :1])[0].mode == "L"
    assert to_images(torch.rand(1, 5, 7, 4))[0].mode == "RGBA"


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 0), (8, 8, 3), (1, 8, 8, 2)])
def test_tensors_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        to_images(torch.zeros(shape))


@pytest.mark.parametrize(
    ("size", "purpose", "side", "expected"),
    [
        ((256, 256), Purpose.UNDERSTAND, 256, (256, 256)),
        ((100, 100), Purpose.UNDERSTAND, 256, (256, 256)),
        ((1024, 768), Purpose.UNDERSTAND, 256, (288, 192)),
        ((1024, 768), Purpose.EDIT, 256, (288, 224)),
        ((1024, 768), Purpose.EDIT, 128, (128, 128)),  # the only one whose sides have size tokens
        ((300, 280), Purpose.EDIT_PUBLISHED, 128, (128, 128)),
    ],
)
def test_a_picture_is_brought_to_about_the_area_of_a_square(size, purpose: Purpose, side: int, expected) -> None:
    assert prepare(noise(*size), purpose, side).size == expected


@pytest.mark.parametrize("side", [-32, 96, 100, 4096])
def test_a_side_that_cannot_be(side: int) -> None:
    with pytest.raises(RequestError, match=f"The size is {side}"):
        prepare(noise(256, 256), Purpose.EDIT, side)


def test_a_model_states_its_own_sides() -> None:
    sizes = ImageSizes(drawing=256, understanding=320, editing=128)
    assert [own_side(sizes, purpose) for purpose in Purpose] == [320, 320, 128, 128]
    assert own_side(ImageSizes(), Purpose.EDIT) == 0
    assert sizes.doubt("editing", 128, 128) is None and ImageSizes().doubt("editing", 999, 1) is None
    assert "made for editing at 128 x 128 pixels, and this is 256 x 256" in sizes.doubt("editing", 256, 256)


def test_a_model_that_states_its_size_for_understanding_gets_exactly_that() -> None:
    for size in ((300, 200), (200, 350), (2000, 1500)):
        picture = Image.new("RGB", size)
        assert prepare_for(ImageSizes(understanding=256), picture, Purpose.UNDERSTAND).size == (256, 256)
        assert prepare_for(ImageSizes(), picture, Purpose.UNDERSTAND).size == prepare(picture, Purpose.UNDERSTAND).size
    assert prepare_for(ImageSizes(understanding=256), picture, Purpose.UNDERSTAND, 512).size != (256, 256)


def test_stepping_up_from_0_goes_through_no_forbidden_side() -> None:
    assert [side_or_own(side) for side in (0, 32, 96, 128, 160)] == [0, 0, 0, 128, 160]
    for side in (-32, 100, 4096):
        with pytest.raises(RequestError, match=f"The size is {side}"):
            side_or_own(side)


def test_what_a_mask_covers_becomes_white() -> None:
    pixels, mask = torch.zeros(2, 4, 4, 3), torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    for picture in to_images(pixels, mask):
        assert [picture.getpixel((0, row)) for row in (0, 3)] == [(255, 255, 255), (0, 0, 0)]
    # what ComfyUI gives with a picture that has no transparency
    assert [np.asarray(picture).max() for picture in to_images(pixels, torch.zeros(1, 64, 64))] == [0, 0]
    with pytest.raises(RequestError, match="does not fit 2 pictures"):
        to_images(pixels, torch.zeros(3, 4, 4))
