import hashlib

import cv2
import numpy as np
import pytest
from PIL import Image

from stages import portrait
from stages.faces import Box, find_faces
from stages.framing import Rectangle, around_face, centred, cuts_face, largest
from stages.types import RowError
from tests.stages.media import ASTRONAUT, plain_picture, settings

LIMIT = 10**8


def framed(path, **changes):
    return portrait.prepare(str(path), settings(**({"crop": "none"} | changes)))


def rule_of(path, **changes):
    with pytest.raises(RowError) as caught:
        framed(path, **changes)
    return caught.value.field, caught.value.rule


# Opening


def test_text_file_named_png_is_a_row_error(tmp_path):
    (tmp_path / "a.png").write_text("this is not a picture")
    assert rule_of(tmp_path / "a.png") == ("image", "is not a picture in a format that Pillow reads")


def test_missing_and_empty_images_are_row_errors(tmp_path):
    (tmp_path / "a.png").touch()
    assert rule_of(tmp_path / "a.png") == ("image", "is an empty file")
    assert rule_of(tmp_path / "b.png") == ("image", "no such file")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_truncated_image_is_a_row_error(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.open(ASTRONAUT).save(path)
    assert framed(path)[0].source_width == 512
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    field, rule = rule_of(path)
    assert field == "image"
    assert "damaged or cut short" in rule or "not a picture" in rule


def test_decompression_bomb_is_refused_from_its_header(tmp_path):
    plain_picture(tmp_path / "a.png", 100, 101)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[:60])  # Its header only: unpacking it would fail otherwise.
    assert rule_of(tmp_path / "b.png", max_image_pixels=10_000) == (
        "image",
        "has more than max_image_pixels=10000 pixels",
    )
    assert framed(tmp_path / "a.png", max_image_pixels=10_100)[0].source_height == 101


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    assert "not a picture" in rule_of(tmp_path / "a.eps")[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = Image.new("RGB", (128, 64), "blue")
    upright.paste("red", (0, 0, 64, 32))
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    picture = upright
    for step in stored:
        picture = picture.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    rgb, _ = portrait.open_rgb(str(tmp_path / "a.png"), LIMIT)
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA", "YCbCr", "HSV"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "tiff" if mode == "HSV" else "png"
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (64, 64), "white").convert("L" if mode == "HSV" else mode)
    image.save(path)
    rgb, notes = portrait.open_rgb(str(path), LIMIT)
    assert (rgb.mode, notes) == ("RGB", [])
    assert np.asarray(rgb).min() >= 253


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 257, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    rgb, _ = portrait.open_rgb(str(tmp_path / "a.png"), LIMIT)
    assert np.asarray(rgb)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_more_than_sixteen_bits_are_a_row_error(tmp_path):
    Image.fromarray(np.array([[0, 1 << 20]], np.int32)).save(tmp_path / "a.tiff")
    assert "16 bits" in rule_of(tmp_path / "a.tiff")[1]
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "b.tiff")
    assert "floating-point" in rule_of(tmp_path / "b.tiff")[1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_on_white_and_said(tmp_path, mode):
    image = Image.new("LA" if mode == "LA" else "RGBA", (64, 64), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    image.convert(mode).save(tmp_path / "a.png")
    rgb, notes = portrait.open_rgb(str(tmp_path / "a.png"), LIMIT)
    assert notes == ["image: has transparent parts, laid on white"]
    assert np.asarray(rgb).min() == 255


def test_animation_gives_its_first_picture_and_says_so(tmp_path):
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    rgb, notes = portrait.open_rgb(str(tmp_path / "a.gif"), LIMIT)
    assert "only the first picture" in notes[0]
    assert np.asarray(rgb)[0, 0, 0] > 200


# Framing


def test_no_face_is_a_row_error_under_crop_face(tmp_path):
    path = plain_picture(tmp_path / "a.png")
    field, rule = rule_of(path, crop="face")
    assert field == "image"
    assert "no face was found; crop=none" in rule


def test_thin_strip_has_no_face():
    assert find_faces(np.zeros((20, 3000, 3), np.uint8)) == []


@pytest.mark.parametrize("aspect", ["keep", "16:9", "9:16", "1:1"])
def test_face_is_well_placed_in_every_aspect(aspect):
    picture, notes = framed(ASTRONAUT, crop="face", aspect=aspect, size="256*256")
    x, y, width, height = picture.crop
    (face,) = find_faces(np.asarray(Image.open(ASTRONAUT).convert("RGB")))
    assert x <= face.x
    assert face.x + face.width <= x + width
    assert 0.15 < (face.y + face.height / 2 - y) / height < 0.6
    assert x + width / 2 == pytest.approx(face.x + face.width / 2, abs=2) or x in (0, 512 - width)
    assert not any("cut" in note for note in notes)


def test_two_faces_are_said(tmp_path):
    one = Image.open(ASTRONAUT).convert("RGB")
    both = Image.new("RGB", (1024, 512))
    both.paste(one, (0, 0))
    both.paste(one, (512, 0))
    both.save(tmp_path / "a.png")
    assert "2 faces" in framed(tmp_path / "a.png", crop="face")[1][0]


def test_true_size_aspect_and_cut_away_share():
    picture, _ = framed(ASTRONAUT, aspect="16:9", size="704*384")
    assert (picture.width, picture.height) == (512, 320)
    assert picture.crop == (0, 96, 512, 320)
    assert (picture.source_width, picture.source_height, picture.cut_away) == (512, 512, 0.375)


def test_crop_rectangle_is_what_is_seen(tmp_path):
    picture, _ = framed(ASTRONAUT, crop="100, 50, 128, 128")
    assert picture.crop == (100, 50, 128, 128)
    rgb = portrait.load(str(ASTRONAUT), picture, LIMIT)
    source = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    np.testing.assert_array_equal(rgb, source[50:178, 100:228])


@pytest.mark.parametrize("crop", ["500,0,128,128", "0,400,64,113"])
def test_crop_rectangle_outside_the_picture_is_a_row_error(crop):
    assert rule_of(ASTRONAUT, crop=crop) == ("crop", "reaches out of the picture of 512x512 pixels")


@pytest.mark.parametrize(("field", "value"), [("crop", "head"), ("aspect", "4:3"), ("size", "704:384")])
def test_unknown_words_are_row_errors_of_their_field(field, value):
    assert rule_of(ASTRONAUT, **{field: value})[0] == field


def test_extremely_long_picture_is_a_row_error(tmp_path):
    plain_picture(tmp_path / "a.png", 20_000, 1)
    assert rule_of(tmp_path / "a.png", size="128*128")[0] == "size"


def test_enlarged_portrait_is_warned_about(tmp_path):
    assert (
        "enlarged 1.33 times to 128x64"
        in framed(plain_picture(tmp_path / "a.png", 96, 48), size="128*128")[1][0]
    )
    assert framed(ASTRONAUT)[1] == []


def test_loaded_portrait_is_what_was_hashed_and_a_changed_file_is_noticed(tmp_path):
    path = plain_picture(tmp_path / "a.png", 300, 200)
    picture, _ = framed(path)
    rgb = portrait.load(str(path), picture, LIMIT)
    assert rgb.shape == (picture.height, picture.width, 3)
    assert rgb.dtype == np.uint8
    assert hashlib.sha256(rgb.tobytes()).hexdigest() == picture.sha256
    Image.open(path).rotate(180).save(path)
    with pytest.raises(RowError, match="has changed"):
        portrait.load(str(path), picture, LIMIT)


def test_largest_rectangle_touches_two_borders():
    assert largest(720, 400, (704, 384)) == (720, 393)
    assert largest(400, 720, (16, 9)) == (400, 225)
    assert largest(10, 10, (1, 100)) == (1, 10)
    assert centred(Rectangle(10, 20, 100, 50), 40, 50) == (40, 20, 40, 50)


def test_chin_is_kept_before_hair_and_borders_limit_both():
    face = Box(40, 200, 100, 120)
    area = Rectangle(0, 0, 300, 600)
    close = around_face(area, 300, 150, face)
    assert close.y + close.height >= face.y + face.height
    assert around_face(area, 300, 300, face).y <= face.y - 0.4 * face.height
    assert around_face(area, 100, 600, Box(-20, 10, 60, 80)).x == 0
    assert around_face(Rectangle(50, 60, 200, 300), 200, 200, Box(60, 330, 60, 80)) == (50, 160, 200, 200)


def test_cut_face_is_noticed():
    assert cuts_face(Rectangle(0, 0, 100, 50), Box(20, 20, 40, 60))
    assert not cuts_face(Rectangle(0, 0, 100, 85), Box(20, 20, 40, 60))


def test_faces_of_large_and_small_pictures_are_the_same():
    rgb = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    (face,) = find_faces(rgb)
    assert face.x < 220 < face.x + face.width
    (large,) = find_faces(cv2.resize(rgb, None, fx=4, fy=4))
    np.testing.assert_allclose(np.array(large) / 4, face, atol=8)
