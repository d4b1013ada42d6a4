"""What families that take pictures have in common: reading picture files, and marks in questions."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from expert_merging.errors import InputError
from expert_merging.questions.calibration import Sample
from expert_merging.questions.entries import MARK
from expert_merging.questions.picture_sources import Picture, content_of

if TYPE_CHECKING:
    from PIL import Image

# What Pillow reads by itself. Some other kinds are handed to programs that run what is in them (EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
# What Pillow raises for damaged files.
_DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    struct.error,
)


def read_picture(file: Picture, *, on_white: bool = False) -> Image.Image:
    """The picture in RGB, turned upright where a camera marked it as rotated, as every viewer shows it.

    Args:
        file: the picture.
        on_white: put it on white where it is transparent; otherwise transparency is dropped.

    Raises:
        InputError: it is no picture, damaged, or larger than Pillow's limit for what may be an attack.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities, such as transparency, that do not matter in RGB
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()  # all kinds, or those that have not been opened before are not known
            with Image.open(io.BytesIO(content_of(file)), formats=_FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                    upright = _eight_bits(upright)
                return (_on_white(upright) if on_white else upright).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(
            f"{file} has more than {Image.MAX_IMAGE_PIXELS} pixels, too many to be read safely; make it smaller"
        ) from None
    except _DAMAGED as error:
        reason = f"it is none of {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{file} cannot be read as a picture ({reason}); is it complete?") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16-bit grey in 8 bits; Pillow's own conversion would cut it off at 255 instead of scaling it."""
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def marked_question(sample: Sample, template: str, *, mark: str, reserved: Sequence[str]) -> str:
    """The question with a mark for every picture that neither it nor the template has one for, in front.

    Args:
        sample: the question and its pictures.
        template: text that the question will stand in.
        mark: what is put in front, with `MARK` in it.
        reserved: tokens that stand for picture content, which a text cannot contain.

    Raises:
        InputError: there are more marks than pictures, or a text contains a reserved token.
    """
    given = template + sample.question
    found = [token for token in reserved if token in given + (sample.response or "")]
    if found:
        raise InputError(
            f"{found[0]} stands for picture content and cannot be part of a question, response or prompt template; "
            f"where a picture belongs, write {MARK}"
        )
    marks, pictures = given.count(MARK), len(sample.images)
    if marks > pictures:
        raise InputError(f"{marks} {MARK} marks for {pictures} pictures; add image_path or remove marks")
    return mark * (pictures - marks) + sample.question
