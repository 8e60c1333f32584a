"""A portrait's file -> the upright, cropped, scaled RGB picture that the model sees."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from conf.schema import Settings
from stages.faces import find_faces
from stages.framing import Rectangle, around_face, centred, cuts_face, largest, parse_aspect, parse_crop
from stages.paths import open_input
from stages.size import parse_size, true_size
from stages.types import Picture, RowError


def prepare(path: str, settings: Settings) -> tuple[Picture, list[str]]:
    """Opens and frames the portrait: how it is cut and scaled, and what the user should know about that.

    Raises RowError for a file or a setting that gives no picture.
    """
    image, notes = open_rgb(path, settings.max_image_pixels)
    crop, (width, height), framing_notes = _frame(path, image, settings)
    if width > crop.width:
        notes.append(
            f"image: enlarged {width / crop.width:.2f} times to {width}x{height}; use a larger portrait"
        )
    picture = Picture(
        width=width,
        height=height,
        crop=(crop.x, crop.y, crop.width, crop.height),
        source_width=image.width,
        source_height=image.height,
        cut_away=round(1 - crop.width * crop.height / (image.width * image.height), 4),
        sha256=_sha256(_scale(image, crop, width, height)),
    )
    return picture, notes + framing_notes


def load(path: str, picture: Picture, max_image_pixels: int) -> np.ndarray:
    """uint8 [height, width, 3], exactly what `prepare` has hashed. Raises RowError if the file changed."""
    image, _ = open_rgb(path, max_image_pixels)
    rgb = _scale(image, Rectangle(*picture.crop), picture.width, picture.height)
    if _sha256(rgb) != picture.sha256:
        raise RowError("image", path, "has changed since it was checked; run again")
    return rgb


def open_rgb(path: str, max_image_pixels: int) -> tuple[Image.Image, list[str]]:
    """Opens a picture of any format and mode -> upright, mode RGB, and notes for the user.

    Transparent parts are laid on white. Raises RowError for what is no picture, damaged, or has more pixels
    than allowed, which is known from the header.
    """
    with open_input("image", path) as file:
        try:
            with _pixel_limit(max_image_pixels):
                opened = Image.open(file, formats=_safe_formats())
                notes = _animation_note(opened)
                opened.load()
                image = ImageOps.exif_transpose(opened)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            rule = f"has more than max_image_pixels={max_image_pixels} pixels"
            raise RowError("image", path, rule) from None
        except Image.UnidentifiedImageError:
            raise RowError("image", path, "is not a picture in a format that Pillow reads") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders let any exception out when a file is damaged.
            raise RowError("image", path, f"is damaged or cut short ({error})") from error
    rgb, alpha_note = _to_rgb(path, image)
    return rgb, notes + alpha_note


def _frame(path: str, image: Image.Image, settings: Settings) -> tuple[Rectangle, tuple[int, int], list[str]]:
    """The crop, the true (width, height), and notes. Where `crop` is a rectangle, `aspect` and the rounding
    of sides cut around its middle."""
    whole = Rectangle(0, 0, image.width, image.height)
    area = parse_crop(settings.crop) or whole
    if area.x + area.width > whole.width or area.y + area.height > whole.height:
        raise RowError(
            "crop", settings.crop, f"reaches out of the picture of {image.width}x{image.height} pixels"
        )
    aspect = parse_aspect(settings.aspect) or (area.width, area.height)
    limit_width, limit_height = parse_size(settings.size)
    try:
        size = true_size(*largest(area.width, area.height, aspect), limit_width * limit_height)
    except ValueError as error:
        raise RowError("size", settings.size, str(error)) from None
    width, height = largest(area.width, area.height, size)
    if settings.crop != "face":
        return centred(area, width, height), size, []
    faces = find_faces(np.asarray(image))
    if not faces:
        raise RowError("image", path, "no face was found; crop=none cuts around the middle instead")
    crop = around_face(area, width, height, faces[0])
    notes = [f"image: {len(faces)} faces, framed around the most certain one"] if len(faces) > 1 else []
    if cuts_face(crop, faces[0]):
        notes.append(
            "image: the face is cut; use another aspect or a portrait with more room around the face"
        )
    return crop, size, notes


def _scale(image: Image.Image, crop: Rectangle, width: int, height: int) -> np.ndarray:
    x, y, w, h = crop
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h)))


def _sha256(rgb: np.ndarray) -> str:
    return hashlib.sha256(rgb.tobytes()).hexdigest()


@contextmanager
def _pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow's own guard against decompression bombs, at our limit and as an error."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _safe_formats() -> list[str]:
    """All formats but EPS, which is a program that Pillow hands to Ghostscript."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _animation_note(image: Image.Image) -> list[str]:
    # An MPO is a phone's JPEG with a preview or a depth map behind it.
    moving = getattr(image, "is_animated", False) and image.format != "MPO"
    return ["image: animated or with several pages; only the first picture is used"] if moving else []


def _to_rgb(path: str, image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.mode == "F":
        raise RowError("image", path, "holds floating-point numbers; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        image = _from_16_bit(path, image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            paper = Image.new("RGBA", rgba.size, "white")
            paper.alpha_composite(rgba)
            return paper.convert("RGB"), ["image: has transparent parts, laid on white"]
    return image.convert("RGB"), []


def _from_16_bit(path: str, image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I and I;16) -> L. Pillow's own conversion clips instead of scaling."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise RowError("image", path, "has more than 16 bits per channel; save it with 8")
    return Image.fromarray(((grey * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
