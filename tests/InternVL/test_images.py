"""Tiles of awkward pictures against the published rules."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from expert_merging.errors import InputError
from InternVL.images import Tiling, grid, pixel_values, read_image, tiles
from tests.InternVL import reference
from tests.internvl import make_picture

PUBLISHED = Tiling(size=448, dynamic=True, thumbnail=True)
SIDES = st.integers(1, 5000)


@given(width=SIDES, height=SIDES, most=st.integers(1, 40), size=st.sampled_from([28, 448]))
def test_grid_is_the_published_one(width, height, most, size):
    tiling = Tiling(size, dynamic=True, thumbnail=True)
    assert grid(width, height, tiling, most) == reference.closest_grid(width, height, most, size)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((448, 448), 6, (1, 1)),
        ((800, 800), 6, (2, 2)),  # the same ratio; more than half of four tiles' pixels
        ((600, 600), 6, (1, 1)),  # less than half of them
        ((1000, 500), 12, (2, 1)),
        ((1920, 1080), 12, (4, 2)),
        ((1920, 1080), 6, (2, 1)),
        ((5000, 1), 6, (6, 1)),
        ((1, 5000), 12, (1, 12)),
        ((1, 1), 12, (1, 1)),
    ],
)
def test_grids_worked_out_by_hand(size, most, expected):
    assert grid(*size, PUBLISHED, most) == expected


def settings(tiling: Tiling) -> dict[str, object]:
    return {
        "force_image_size": tiling.size,
        "dynamic_image_size": tiling.dynamic,
        "use_thumbnail": tiling.thumbnail,
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (37, 100), (448, 448), (1300, 900)])
@pytest.mark.parametrize(("dynamic", "thumbnail"), [*itertools.product([True, False], repeat=2)])
def test_pixels_are_the_published_ones(size, dynamic, thumbnail, tmp_path):
    image = read_image(make_picture(tmp_path / "a.png", size))
    tiling = Tiling(448, dynamic, thumbnail)
    ours = pixel_values(image, tiling, 6)
    torch.testing.assert_close(ours, reference.pixel_values(image, settings(tiling), 6), rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32


def test_thumbnail_comes_last_and_only_beside_several_tiles(tmp_path):
    image = read_image(make_picture(tmp_path / "a.png", (900, 448)))
    cut = tiles(image, PUBLISHED, 6)
    assert len(cut) == 3
    assert cut[-1].tobytes() == image.resize((448, 448), Image.Resampling.BICUBIC).tobytes()
    assert len(tiles(image, PUBLISHED, 1)) == 1


def values(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).long()


MODES = {
    "L": (120, 120, 120),
    "1": (255, 255, 255),
    "LA": (120, 120, 120),
    "RGBA": (10, 200, 30),
    "CMYK": (10, 200, 30),
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_become_rgb(mode, tmp_path):
    colour = {"L": 120, "1": 1, "LA": (120, 7), "RGBA": (10, 200, 30, 50), "CMYK": (245, 55, 225, 0)}[mode]
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (5, 4), colour).save(file)
    image = read_image(file)
    assert image.mode == "RGB"
    assert (values(image) == torch.tensor(MODES[mode])).all()


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 65535)
    image.putpixel((1, 0), 0)
    image.save(tmp_path / "a.png")
    assert values(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [0] * 3]


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 10, 20, 30, 240, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = read_image(tmp_path / "a.png")
    assert values(read)[0].tolist() == [[250, 10, 20], [30, 240, 50]]
    assert not caught


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_are_turned_upright(orientation, tmp_path):
    """Each camera orientation, stored as such a camera stores it."""
    upright = read_image(make_picture(tmp_path / "upright.png", (40, 24)))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "stored.png", exif=exif)
    read = read_image(tmp_path / "stored.png")
    assert (read.size, read.tobytes()) == (upright.size, upright.tobytes())


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp"])
def test_truncated_files_are_named(kind, tmp_path):
    file = make_picture(tmp_path / f"a.{kind}", (300, 200))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"a\.{kind} cannot be read as a picture \(.*\); is it complete\?"):
        read_image(file)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures_are_named(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("limit", [100, 50])
def test_too_many_pixels_are_refused(limit, tmp_path, monkeypatch):
    """Pillow only warns up to twice its limit; neither is read."""
    file = make_picture(tmp_path / "a.png", (15, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=rf"a\.png has more than {limit} pixels, too many to be read safely; make it"):
        read_image(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read as a picture"):
        read_image(Path(tmp_path / "gone.png"))
