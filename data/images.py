"""Images and masks in, images out: the only place that opens image files.

Decisions that are not obvious
* Pixels come as a person sees them: turned as EXIF says, 16 bits scaled and not cut off, CMYK and palettes as colours,
  transparency laid over white. White, because what is transparent was made to lie on a page: dark text on a
  transparent ground would vanish in black.
* Only formats whose decoders do nothing but decode are tried, whatever a file's name says; among Pillow's others are
  some that start programs (EPS runs Ghostscript).
* The declared size is compared with `max_pixels` before anything is decoded. Pillow's own guard is one number for the
  process, warns where it should refuse and refuses what is allowed here; it is switched off in its favour.
* A mask that cannot be understood is an error, never a mask of zeros.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from data.audio import PathLike, atomic_path
from data.errors import ImageError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes (lower case) that a folder scan takes for images."""

MAX_PIXELS = 200_000_000
"""Images that declare more pixels are refused; 200 megapixels take 600 MB."""

NOT_KNOWN = 255
"""The value of a mask's pixels for which nobody knows whether they are marked."""

Image.MAX_IMAGE_PIXELS = None  # see above: `_open` looks at the size itself

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
_LFS_HEAD = b"version https://git-lfs"
_GREY = (299, 587, 114)  # thousandths, ITU-R BT.601: whole numbers, so that a threshold is exact


def read_image(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image as colours. Of an animation or a file with several pages, the first.

    Args:
        path: a JPEG, PNG, BMP, WEBP or TIFF file.
        max_pixels: images that declare more are refused.

    Shape:
        Returns uint8 `(H, W, 3)`, RGB.

    Raises:
        ImageError: the file is missing, a folder, empty, damaged, too large, a Git-LFS pointer or no image.
    """
    with _open(path, max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            grey = _from_16_bits(np.asarray(image))
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(_over_white(image))


def read_mask(path: PathLike, *, ignore_value: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask of any kind: 1, 8 or 16 bits, palette, colours (the brightest channel counts), transparency.

    The values are {0, 1} or {0, 255} (of 16 bits also {0, 65535}): where the largest is 1 every value above 0 is a
    mark, else those above 127. Where only the transparency tells pixels apart, it is the mask, and opaque is marked.

    Args:
        path: as in `read_image`; turned as EXIF says, like its image.
        ignore_value: pixels of this stored value (of a palette: its index) are not known.
        max_pixels: as in `read_image`.

    Shape:
        Returns uint8 `(H, W)`: 0 not marked, 1 marked, 255 not known.

    Raises:
        ImageError: as `read_image`, or values from which no mask can be told (a largest value from 2 to 127).
    """
    with _open(path, max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        values, stored = _mask_values(image), np.array(image)
        if stored.ndim == 3:
            stored = stored[:, :, : len(image.getbands()) - ("A" in image.getbands())].max(axis=2)
    known = np.full(values.shape, True) if ignore_value is None else stored != ignore_value
    highest = int(values.max(initial=0, where=known))
    if 1 < highest <= 127:
        raise ImageError(
            f"{path}: not a mask, its largest value is {highest}; masks are 0 and 1, or 0 and 255 (above 127 is marked)"
        )
    mask = (values > (127 if highest > 1 else 0)).astype(np.uint8)
    mask[~known] = NOT_KNOWN
    return mask


def difference_mask(
    marked: np.ndarray, clean: np.ndarray, *, threshold: int = 30, channels: str = "max", open: bool = False
) -> np.ndarray:
    """The mask of a marked photo whose clean version is known: where the two differ.

    Args:
        marked, clean: of the same size.
        threshold: a pixel is marked where the difference is above it, in levels of 255.
        channels: the difference is that of the channel that differs most ("max"), or the weighted mean that makes a
            colour grey ("grey").
        open: remove what is thinner than 3 pixels, such as noise of JPEG; thin strokes go with it.

    Shape:
        `marked` and `clean` are uint8 `(H, W, 3)`; returns uint8 `(H, W)` of 0 and 1.
    """
    if marked.shape != clean.shape:
        raise ValueError(f"marked and clean must have one shape, got {marked.shape} and {clean.shape}")
    if channels not in ("max", "grey"):
        raise ValueError(f"channels must be max or grey, got {channels!r}")
    apart = np.abs(marked.astype(np.int16) - clean.astype(np.int16))  # (H, W, 3)
    mask = apart.max(axis=2) > threshold if channels == "max" else apart @ np.int32(_GREY) > threshold * 1000
    if open:
        square = np.full((3, 3), True)
        mask = ndimage.binary_dilation(ndimage.binary_erosion(mask, square, border_value=1), square)
    return mask.astype(np.uint8)


def write_png(path: PathLike, pixels: np.ndarray) -> None:
    """Write an 8-bit PNG; it appears whole or not at all, missing folders are made.

    Args:
        path: a name that ends in .png.
        pixels: bool becomes 0 and 255; uint8 is kept; floats from 0 to 1 become 0 to 255, rounded.

    Shape:
        `pixels` is `(H, W)`, or uint8 `(H, W, 3)`.

    Raises:
        ImageError: another name, or the file cannot be written.
    """
    if not os.fspath(path).lower().endswith(".png"):
        raise ImageError(f"{path}: images are written as PNG, give a name that ends in .png")
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8):
        raise ValueError(f"pixels must be (H, W), or uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= 1):
            raise ValueError(f"floats must be from 0 to 1, got {pixels.min()} to {pixels.max()}")
        pixels = np.floor(pixels * 255 + 0.5).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be bool, uint8 or floats, got {pixels.dtype}")
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _open(path: PathLike, max_pixels: int) -> Iterator[Image.Image]:
    """The image, opened; every way in which that, or what is done with it, fails becomes one ImageError."""
    _look(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_header(path, image, max_pixels)
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image that can be read (JPEG, PNG, BMP, WEBP, TIFF); replace or remove it"
        ) from None
    # A damaged file makes decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, …
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImageError(f"{path}: damaged, cannot be decoded ({text}); replace or remove it") from error


def _look(path: PathLike) -> None:
    """Raise ImageError unless the file exists, is a file, and is neither empty nor a Git-LFS pointer."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # a pipe would be waited for
        raise ImageError(f"{path}: is a pipe or a device, a file is needed")
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS_HEAD))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; check the path (a manifest's are relative to its folder)") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, an image is needed") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageError(f"{str(path)!r}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if not head:
        raise ImageError(f"{path}: is empty (0 bytes); fetch it again")
    if head == _LFS_HEAD:
        raise ImageError(f"{path}: is a Git-LFS pointer, not an image; run `git lfs pull` where it came from")


def _check_header(path: PathLike, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: declares {width} x {height} pixels, more than the {max_pixels} that are allowed; scale it down"
        )
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{path}: has 32-bit values of no known range (mode {image.mode}); save it with 8 or 16 bits a channel"
        )


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """Levels 0 … 65535 as 0 … 255, rounded: 257 steps make one."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    """An image of any mode with 8 bits as RGB, transparency laid over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB")


def _mask_values(image: Image.Image) -> np.ndarray:
    """The level of each pixel of a mask, uint8 or uint16 `(H, W)`; 16 bits are scaled if they are used."""
    if image.mode.startswith("I;16"):
        values = np.array(image)
        return values if values.max(initial=0) <= 255 else _from_16_bits(values)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")).max(axis=2)
    pixels = np.array(image.convert("RGBA"))  # (H, W, 4)
    colours, opacity = pixels[:, :, :3], pixels[:, :, 3]
    levels = colours.max(axis=2)
    if opacity.min(initial=255) == opacity.max(initial=0):
        return levels
    visible = colours[opacity > 0]  # (pixels, 3)
    # One colour for all that is seen: a stroke on nothing. Its colour, often black, says nothing (IOPaint issue 603).
    return opacity if (visible == visible[0]).all() else np.where(opacity > 127, levels, 0)
