"""Images and masks that cannot be used. Each is one among good ones: a training passes over it and says so."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.manifest import write_manifest
from data.watermark import WatermarkData
from tests.malformed.cases import Case, Kind, World, counted

SIZE = 48
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape or (SIZE, SIZE, 3)).astype(np.uint8)


def encoded(suffix: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(pixels())).save(file, format=FORMATS.get(suffix, suffix.upper()), **options)
    return file.getvalue()


def png(width: int, height: int, *, colour: int = 2, depth: int = 8, content: bytes = b"") -> bytes:
    """A PNG file with whatever is said in its header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def one_bad(world: World, make: Callable[[Path], None], suffix: str, what: str, key: str = "image_filepath") -> Case:
    """A manifest of two good images, and one of which the file under *key* is made by *make*."""
    folder = world.folder / f"image{len(os.listdir(world.folder))}"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded("png"))
    (folder / "mask.png").write_bytes(encoded("png", Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255)))
    bad = folder / f"bad.{suffix}"
    make(bad)
    marks = {"clean_filepath": "good.png"} if key == "clean_filepath" else {"mask_filepath": "mask.png"}
    good = {"image_filepath": "good.png", **marks}
    write_manifest(folder / "m.jsonl", [good, good, {**good, key: str(bad)}])
    options = {"crop": 32, "batch_size": 1, "loader": {"num_workers": 0}, "max_pixels": 10_000_000}
    return Case(what, lambda: counted(WatermarkData(train_manifest=str(folder / "m.jsonl"), **options)), str(bad))


def bytes_of(
    world: World, files: Sequence[tuple[str, bytes]], what: str, key: str = "image_filepath"
) -> Iterator[Case]:
    for suffix, content in files:
        yield one_bad(world, lambda bad, c=content: None if bad.write_bytes(c) else None, suffix, what, key)


def cut(suffix: str, *shares: float) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        whole = encoded(suffix)
        for share in shares:
            yield from bytes_of(world, [(suffix, whole[: int(share * len(whole))])], f"{share:.0%} of a .{suffix}")

    return kind


def empty(world: World) -> Iterator[Case]:
    yield from bytes_of(world, [(suffix, b"") for suffix in ("png", "jpg", "webp")], "0 bytes")


def no_image(world: World) -> Iterator[Case]:
    yield from bytes_of(world, [("png", np.random.default_rng(0).bytes(4000))], "random bytes")
    yield from bytes_of(world, [("jpg", b"this is a text\n")], "text")
    yield from bytes_of(world, [("png", b"XXXX" + encoded("png")[4:])], "no magic number")
    yield from bytes_of(world, [("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")], "SVG")


def other_format(world: World) -> Iterator[Case]:
    frames = [Image.fromarray(pixels(SIZE, SIZE + i)) for i in range(3)]
    gif = encoded("gif", frames[0], save_all=True, append_images=frames[1:])
    yield from bytes_of(world, [("png", gif)], "an animated GIF")
    canary = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n%%EOF\n"
    yield from bytes_of(world, [("png", canary)], "a program of EPS")
    yield from bytes_of(world, [("jpg", encoded("ppm"))], "PPM")


def bomb(world: World) -> Iterator[Case]:
    sizes = [(100_000, 100_000), (2**31 - 1, 1), (1, 2**31 - 1), (5000, 5000)]
    for width, height in sizes:
        content = bytes(1000)
        yield from bytes_of(world, [("png", png(width, height, content=content))], f"{width} x {height} pixels")
    bmp = bytearray(encoded("bmp"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    yield from bytes_of(world, [("bmp", bytes(bmp))], "50000 x 50000 pixels")


def no_size(world: World) -> Iterator[Case]:
    for width, height in ((0, 10), (10, 0), (0, 0)):
        yield from bytes_of(world, [("png", png(width, height))], f"{width} x {height} pixels")


def without_range(world: World) -> Iterator[Case]:
    """32 bits per pixel of no known range."""
    for mode, kind in (("F", np.float32), ("I", np.int32)):
        image = Image.fromarray(pixels(SIZE, SIZE).astype(kind))
        assert image.mode == mode
        yield from bytes_of(world, [("tif", encoded("tif", image))], f"mode {mode}")
    image = Image.fromarray(np.full((SIZE, SIZE), np.nan, np.float32))
    yield from bytes_of(world, [("tif", encoded("tif", image))], "NaN pixels")


def damaged_inside(world: World) -> Iterator[Case]:
    for at in (40, 200, -30):
        content = bytearray(encoded("png"))
        content[at] ^= 0xFF
        yield from bytes_of(world, [("png", bytes(content))], f"byte {at} changed")


def odd_header(world: World) -> Iterator[Case]:
    for colour, depth in ((9, 8), (2, 3), (3, 8)):
        yield from bytes_of(world, [("png", png(SIZE, SIZE, colour=colour, depth=depth))], f"colour {colour}, {depth}")


def lfs_pointer(world: World) -> Iterator[Case]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 12345\n"
    yield from bytes_of(world, [("png", pointer)], "a Git-LFS pointer as an image")
    yield from bytes_of(world, [("png", pointer)], "a Git-LFS pointer as a mask", "mask_filepath")


def not_a_file(world: World) -> Iterator[Case]:
    yield one_bad(world, os.mkdir, "png", "a folder")
    yield one_bad(world, os.mkfifo, "png", "a pipe that nobody writes to")
    yield one_bad(world, lambda bad: os.symlink("nowhere.png", bad), "png", "a link to nothing")
    yield one_bad(world, lambda bad: os.symlink("/dev/zero", bad), "png", "an endless device", "mask_filepath")
    yield one_bad(world, lambda bad: os.symlink("/proc/self/mem", bad), "png", "a file that nobody may read")


def other_size(key: str) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        for shape in ((SIZE, SIZE + 1), (SIZE // 2, SIZE // 2), (1, 1)):
            image = Image.fromarray(np.zeros(shape, np.uint8))
            yield from bytes_of(world, [("png", encoded("png", image))], f"{shape} pixels", key)

    return kind


def mask_values(world: World) -> Iterator[Case]:
    for highest in (2, 100, 127):
        image = Image.fromarray(np.full((SIZE, SIZE), highest, np.uint8))
        yield from bytes_of(world, [("png", encoded("png", image))], f"a mask of {highest}", "mask_filepath")


def damaged_mask(world: World) -> Iterator[Case]:
    whole = encoded("png", Image.fromarray(pixels(SIZE, SIZE)))
    files = [("png", b""), ("png", whole[:100]), ("png", whole[: len(whole) // 2]), ("png", b"not a mask")]
    yield from bytes_of(world, files, "a damaged mask", "mask_filepath")


KINDS: dict[str, Kind] = {
    "truncated PNG": cut("png", 0.01, 0.5, 0.95),
    "truncated JPEG": cut("jpg", 0.01, 0.5, 0.95),
    "truncated WEBP": cut("webp", 0.01, 0.5, 0.95),
    "truncated BMP": cut("bmp", 0.01, 0.5, 0.95),
    "truncated TIFF": cut("tif", 0.001, 0.5, 0.95),
    "image of 0 bytes": empty,
    "no image in the file": no_image,
    "image of a format that is not taken": other_format,
    "image that declares too many pixels": bomb,
    "image without size": no_size,
    "image of values without range": without_range,
    "image damaged inside": damaged_inside,
    "image with an impossible header": odd_header,
    "Git-LFS pointer as an image": lfs_pointer,
    "no file but something else as an image": not_a_file,
    "mask of another size": other_size("mask_filepath"),
    "clean photo of another size": other_size("clean_filepath"),
    "mask of unclear values": mask_values,
    "damaged mask": damaged_mask,
}
