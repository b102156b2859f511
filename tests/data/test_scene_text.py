"""Signs of the scene: placed by the perspective that they are given, opaque, and drawn anew for each generator."""

import json

import numpy as np
from PIL import Image

from data.fonts import FontBook
from data.scene_text import draw_scene_text, perspective

GREY = np.full((96, 128, 3), 128, np.uint8)
FONTS = FontBook(["matplotlib"])


def test_perspective_takes_the_corners_to_the_corners():
    corners = np.array([(3, 5), (60, 0), (50, 40), (0, 30)], dtype=float)
    a, b, c, d, e, f, g, h = perspective(corners, 80, 20)
    for (x, y), (u, v) in zip(corners, [(0, 0), (80, 0), (80, 20), (0, 20)], strict=True):
        depth = g * x + h * y + 1
        np.testing.assert_allclose([(a * x + b * y + c) / depth, (d * x + e * y + f) / depth], [u, v], atol=1e-9)


def test_pillow_reads_the_numbers_as_they_are_meant():
    sheet = Image.new("L", (40, 20), 255)
    corners = np.array([(10, 10), (50, 10), (50, 30), (10, 30)], dtype=float)
    moved = np.asarray(sheet.transform((64, 48), Image.Transform.PERSPECTIVE, perspective(corners, 40, 20)))
    expected = np.zeros((48, 64), np.uint8)
    expected[10:30, 10:50] = 255
    np.testing.assert_array_equal(moved, expected)


def draw(seed: int) -> tuple[np.ndarray, list[dict]]:
    return draw_scene_text(GREY, np.random.default_rng(seed), fonts=FONTS, scripts=["latin", "cyrillic"])


def test_signs_change_a_part_of_the_photo_and_the_record_tells_them():
    texts, changed = [], []
    for seed in range(12):
        photo, record = draw(seed)
        assert photo.shape == GREY.shape and photo.dtype == np.uint8
        assert 1 <= len(record) <= 3 and json.loads(json.dumps(record)) == record
        texts += [sign["text"] for sign in record]
        changed.append(np.mean((photo != GREY).any(2)))
    assert np.all(GREY == 128)  # the photo that was given stays as it is
    assert any(texts) and None in texts  # text, and graphics without
    assert 0.01 < np.mean(changed) < 0.5


def test_the_generator_decides():
    np.testing.assert_array_equal(draw(5)[0], draw(5)[0])
    assert draw(5)[1] == draw(5)[1] != draw(6)[1]
