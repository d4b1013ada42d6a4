"""Reading awkward picture files, and marks in questions."""

from __future__ import annotations

import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from dataset.pictures import TEST_QUESTIONS
from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.entries import MARK
from expert_merging.questions.pictures import marked_question, read_picture
from tests.internvl import make_picture


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
    image = read_picture(file)
    assert image.mode == "RGB"
    assert (values(image) == torch.tensor(MODES[mode])).all()


@pytest.mark.parametrize(("kind", "mode"), [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("pgm", "I;16")])
def test_sixteen_bit_grey_keeps_its_shades(kind, mode, tmp_path):
    image = Image.new(mode, (4, 1))
    for place, shade in enumerate((65535, 0, 128 * 257, 50 * 257)):
        image.putpixel((place, 0), shade)
    file = tmp_path / f"a.{kind}"
    image.save(file)
    for on_white in (False, True):
        read = read_picture(file, on_white=on_white)
        assert values(read)[0].tolist() == [[255] * 3, [0] * 3, [128] * 3, [50] * 3]


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 10, 20, 30, 240, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = read_picture(tmp_path / "a.png")
    assert values(read)[0].tolist() == [[250, 10, 20], [30, 240, 50]]
    assert not caught


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_transparent_pictures_can_be_put_on_white(mode, tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    image = image.convert(mode)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.putdata([0, 1, 0])
    transparent = {"RGB": (200,) * 3, "L": 200, "P": bytes([255, 0]), "1": 1}.get(mode)
    image.save(tmp_path / "a.png", **({} if transparent is None else {"transparency": transparent}))
    shade = 255 if mode == "1" else 200
    assert values(read_picture(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [shade] * 3, [0] * 3]
    read = read_picture(tmp_path / "a.png", on_white=True)
    assert read.mode == "RGB"
    assert values(read)[0].tolist() == [[0] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_are_turned_upright(orientation, tmp_path):
    """Each camera orientation, stored as such a camera stores it."""
    upright = read_picture(make_picture(tmp_path / "upright.png", (40, 24)))
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
    read = read_picture(tmp_path / "stored.png")
    assert (read.size, read.tobytes()) == (upright.size, upright.tobytes())


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp"])
def test_truncated_files_are_named(kind, tmp_path):
    file = make_picture(tmp_path / f"a.{kind}", (300, 200))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"a\.{kind} cannot be read as a picture \(.*\); is it complete\?"):
        read_picture(file)


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), NotImplementedError("rare"), TypeError("odd"), KeyError(3), ZeroDivisionError()]
)
def test_whatever_a_damaged_file_does_to_pillow_it_is_named(error, tmp_path, monkeypatch):
    file = make_picture(tmp_path / "a.png", (3, 2))

    def fail(*_):
        raise error

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture \(.*\); is it complete\?"):
        read_picture(file)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures_are_named(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")


def test_a_script_that_is_called_a_picture_is_not_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, which runs it."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    (tmp_path / "q.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"q\.png cannot be read as a picture \(it is none of PNG, JPEG, .*\)"):
        read_picture(tmp_path / "q.png")


def test_a_picture_too_large_to_be_one_is_not_read(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 1 << 40)
    with pytest.raises(InputError, match=r"a\.png has more than 128 MiB, too many for a file of its kind"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("limit", [100, 50])
def test_too_many_pixels_are_refused(limit, tmp_path, monkeypatch):
    """Pillow only warns up to twice its limit; neither is read."""
    file = make_picture(tmp_path / "a.png", (15, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=rf"a\.png has more than {limit} pixels, too many to be read safely; make it"):
        read_picture(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read \(No such file or directory\)"):
        read_picture(Path(tmp_path / "gone.png"))


PICTURES = (Path("a.png"), Path("b.png"))


@pytest.mark.parametrize(
    ("question", "template", "expected"),
    [
        ("What?", "{question}", "<image>;<image>;What?"),
        ("What is <image>?", "{question}", "<image>;What is <image>?"),
        ("<image> or <image>?", "{question}", "<image> or <image>?"),
        ("What?", "<image> first. {question}", "<image>;What?"),
    ],
)
def test_pictures_without_a_mark_come_first(question, template, expected):
    sample = Sample.test(question, *PICTURES)
    assert marked_question(sample, template, mark=f"{MARK};", reserved=["<pad>"]) == expected


def test_more_marks_than_pictures_are_refused():
    with pytest.raises(InputError, match=r"^3 <image> marks for 2 pictures; add image_path or remove marks$"):
        marked_question(Sample.test("<image><image>", *PICTURES), MARK, mark=MARK, reserved=[])


@pytest.mark.parametrize(
    ("question", "template", "response"), [("<pad>", "", ""), ("", "<pad>", ""), ("", "", "<pad>")]
)
def test_tokens_that_stand_for_picture_content_are_refused(question, template, response):
    sample = Sample("t", "e", question, response, "0", PICTURES)
    with pytest.raises(
        InputError, match=r"^<pad> stands for picture content and cannot be part of a question, response"
    ):
        marked_question(sample, template, mark=MARK, reserved=["<end>", "<pad>"])


def test_pictures_of_the_test_questions_are_there():
    assert all(file.is_file() for sample in TEST_QUESTIONS for file in sample.images)
