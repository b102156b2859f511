"""Images and masks as a person sees them, and each way in which a file can be wrong as one line."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import images
from data.errors import ImageError
from data.images import difference_mask, read_image, read_mask, write_png

SUFFIXES = ("jpg", "png", "bmp", "webp", "tif")


def photo(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def header_only_png(path: Path, width: int, height: int) -> Path:
    """A PNG that declares a size and holds one row of it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + width))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def message(function, *arguments, **options) -> str:
    """The one line of an ImageError, which begins with the path."""
    with pytest.raises(ImageError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert text.startswith((f"{arguments[0]}: ", f"'{arguments[0]}': ")) and "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_colours_and_size(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", np.full((9, 5, 3), (200, 100, 50), np.uint8))
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (9, 5, 3)
    np.testing.assert_allclose(pixels.reshape(-1, 3), np.full((45, 3), (200, 100, 50)), atol=6)  # lossy: JPEG, WEBP


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_and_its_mask_alike(tmp_path: Path, suffix: str, orientation: int) -> None:
    """White and black only: an image is its own mask, whatever way it is stored."""
    shown = np.zeros((24, 32, 3), np.uint8)
    shown[:8, :16] = 255  # one corner: all eight ways differ
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose that undoes it
    stored = Image.fromarray(shown)
    stored = stored.transpose(Image.Transpose(back[orientation])) if orientation in back else stored
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    pixels = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(pixels.astype(int), shown.astype(int), atol=30)
    assert pixels.shape == (24, 32, 3)
    assert np.array_equal(read_mask(tmp_path / f"a.{suffix}"), shown[:, :, 0] > 127)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    saved(tmp_path / "a.png", levels)
    saved(tmp_path / "a.tif", levels)
    for name in ("a.png", "a.tif"):
        assert read_image(tmp_path / name)[0].tolist() == [[level] * 3 for level in (0, 0, 1, 1, 128, 255)]


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 127), (255, 128, 128)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes(tmp_path: Path, mode: str, stored: object, seen: tuple[int, ...]) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"  # Pillow writes CMYK as Adobe does, inverted
    Image.new(mode, (16, 16), stored).save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(read_image(tmp_path / f"a.{suffix}").reshape(-1, 3), np.tile(seen, (256, 1)), atol=2)


def test_palettes_are_colours_and_may_be_transparent(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert read_image(tmp_path / "opaque.png")[0].tolist() == [[10, 20, 30], [200, 0, 0]]
    assert read_image(tmp_path / "clear.png")[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_the_first_picture_of_several(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for name in ("a.tif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert read_image(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "drawing.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    )  # would run Ghostscript
    Image.new("L", (4, 4)).save(tmp_path / "gif.png", format="GIF")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    for name, says in {
        "missing.png": "no such file",
        "empty.png": "is empty (0 bytes)",
        "text.png": "not an image that can be read",
        "pointer.png": "git lfs pull",
        "drawing.jpg": "not an image that can be read",
        "gif.png": "not an image that can be read",
        "float.tif": "32-bit values",
        ".": "is a folder",
    }.items():
        for read in (read_image, read_mask):
            assert says in message(read, tmp_path / name)
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image("a\0.png")


def test_a_truncated_jpeg_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", photo(64, 64), quality=95)
    path.write_bytes(path.read_bytes()[:2500])
    assert "truncated" in message(read_image, path) and "truncated" in message(read_mask, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd metadata
def test_damage_is_never_more_than_an_image_error(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", photo(16, 16))
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    num_refused = 0
    for trial in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, min(len(damaged), 120), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert read_image(path, max_pixels=10**6).shape[2] == 3
        except ImageError as error:
            num_refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert num_refused > 10


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = header_only_png(tmp_path / "bomb.png", 60_000, 60_000)
    large = header_only_png(tmp_path / "large.png", 10_000, 15_000)  # Pillow would warn, and from 179 million on refuse
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, read_mask):
            assert "declares 60000 x 60000 pixels, more than the 200000000" in message(read, bomb)
        with images._open(large, images.MAX_PIXELS) as image:
            assert image.size == (10_000, 15_000)
        assert "declares 10000 x 15000" in message(read_image, large, max_pixels=10**6)


TRUE_MASK = np.array([[1, 1, 0], [0, 1, 0]], np.uint8)


@pytest.mark.parametrize(
    "stored",
    [
        TRUE_MASK,
        TRUE_MASK * 255,
        np.where(TRUE_MASK, 128, 127).astype(np.uint8),
        TRUE_MASK.astype(bool),
        TRUE_MASK.astype(np.uint16),
        TRUE_MASK.astype(np.uint16) * 255,
        TRUE_MASK.astype(np.uint16) * 65535,
        np.stack([TRUE_MASK * 0, TRUE_MASK * 255, TRUE_MASK * 0], 2),  # one channel tells
        np.stack([TRUE_MASK * 255] * 3 + [TRUE_MASK * 0 + 255], 2),  # opaque everywhere: the colour tells
        np.stack([TRUE_MASK * 0] * 3 + [TRUE_MASK * 255], 2),  # black strokes on nothing
        np.stack([TRUE_MASK * 0 + 255] * 3 + [TRUE_MASK * 255], 2),  # white ones
        np.stack([255 - TRUE_MASK * 255] * 3 + [TRUE_MASK * 255], 2),  # black ones on unseen white
        np.stack([TRUE_MASK * 0, TRUE_MASK * 255], 2),  # grey with transparency
    ],
)
def test_masks_of_all_kinds(tmp_path: Path, stored: np.ndarray) -> None:
    mask = read_mask(saved(tmp_path / "a.png", stored))
    assert mask.dtype == np.uint8 and np.array_equal(mask, TRUE_MASK)


def test_a_mask_with_a_palette_is_what_it_shows(tmp_path: Path) -> None:
    image = Image.fromarray(1 - TRUE_MASK).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), TRUE_MASK)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("mode", ["L", "RGBA", "1"])
def test_a_mask_of_one_value(tmp_path: Path, level: int, mode: str) -> None:
    saved(tmp_path / "a.png", np.full((3, 4), level, np.uint8), mode)
    assert np.array_equal(read_mask(tmp_path / "a.png"), np.full((3, 4), level // 255))


def test_pixels_that_are_not_known(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 255], [0, 1, 0]], np.uint8)
    expected = [[0, 1, 255], [0, 1, 0]]
    path = saved(tmp_path / "a.png", stored)
    assert read_mask(path, ignore_value=255).tolist() == expected
    assert read_mask(path).tolist() == [[0, 0, 1], [0, 0, 0]]
    coloured = saved(tmp_path / "b.png", np.stack([stored] * 3 + [np.full_like(stored, 255)], 2))
    assert read_mask(coloured, ignore_value=255).tolist() == expected  # its opacity of 255 is no value of the mask


def test_a_mask_that_would_come_out_empty_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", TRUE_MASK * 2)
    assert "largest value is 2" in message(read_mask, path)


def test_difference_mask() -> None:
    clean = np.full((12, 12, 3), 100, np.uint8)
    marked = clean.copy()
    marked[3:8, 3:8] += 40
    marked[3:8, 3:8, 1] = 100
    marked[0, 0, 2] = 0  # darker, one channel, one pixel
    marked[11, 11] = 130  # exactly at the threshold
    square = np.zeros((12, 12), bool)
    square[3:8, 3:8] = True
    dot = square.copy()
    dot[0, 0] = True
    assert np.array_equal(difference_mask(marked, clean), dot)
    assert np.array_equal(difference_mask(clean, marked), dot)  # uint8 must not wrap around
    assert np.array_equal(difference_mask(marked, clean, open=True), square)
    assert not difference_mask(marked, clean, channels="grey").any()  # 0.413 of 40, 0.114 of 100
    grey = difference_mask(marked, clean, channels="grey", threshold=16)
    assert np.array_equal(grey, square | (marked[:, :, 1] == 130))
    with pytest.raises(ValueError, match="one shape"):
        difference_mask(marked, clean[:-1])
    with pytest.raises(ValueError, match="max or grey"):
        difference_mask(marked, clean, channels="red")


def test_opening_keeps_what_lies_at_the_edge() -> None:
    clean = np.zeros((8, 8, 3), np.uint8)
    marked = clean.copy()
    marked[:3, :3] = 255
    assert difference_mask(marked, clean, open=True).sum() == 9


def test_written_images_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    write_png(path, photo())
    assert np.array_equal(read_image(path), photo())
    write_png(path, TRUE_MASK.astype(bool))
    assert np.array_equal(np.asarray(Image.open(path)), TRUE_MASK * 255) and np.array_equal(read_mask(path), TRUE_MASK)
    write_png(path, np.array([[0.0, 0.5, 1.0, 1 / 255]], np.float32))
    assert np.asarray(Image.open(path)).tolist() == [[0, 128, 255, 1]]
    write_png(path, photo()[:, :, 0][:, ::2])
    assert np.array_equal(read_image(path)[:, :, 1], photo()[:, ::2, 0])
    assert [found.name for found in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "pixels",
    [np.zeros(3), np.zeros((2, 2, 3)), np.zeros((2, 2), int), np.full((2, 2), 1.1), np.full((2, 2), np.nan)],
)
def test_what_is_no_image_is_not_written(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must be|floats must be"):
        write_png(tmp_path / "a.png", pixels)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "cannot be written" in message(write_png, tmp_path / "a.png", TRUE_MASK)
    assert "ends in .png" in message(write_png, tmp_path / "a.jpg", TRUE_MASK)


def test_pillow_turns_as_we_say(tmp_path: Path) -> None:
    """The table of `test_exif_turns_an_image_and_its_mask_alike` against Pillow's own."""
    pixels = photo(3, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(read_image(tmp_path / "a.png"), shown) and np.array_equal(shown, np.rot90(pixels, 3))
