"""What must hold for every network (an identity, a constant), and a small U-Net against itself on the whole image."""

import sys
from pathlib import Path

import pytest
import torch

from modules.adaptive_batch import AdaptiveBatch
from modules.tiling import _axis_weights, gaussian_window, predict_in_tiles, tile_starts
from modules.unet import UNet

SIZES = [(64, 64), (65, 64), (100, 333), (20, 150), (150, 20), (1, 200), (3, 5)]


def fixed(size: int) -> AdaptiveBatch:
    return AdaptiveBatch(size=size, most=max(size, 32), adapt=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_an_identity_gives_the_image_to_the_last_bit(size, overlap):
    torch.manual_seed(0)
    image = torch.randn(1, *size) * torch.logspace(-30, 30, size[1])  # float32 of every size
    output = predict_in_tiles(lambda tiles: tiles, image, tile=64, overlap=overlap, batch=fixed(3))
    assert output.dtype == torch.float32
    assert torch.equal(output, image)


@pytest.mark.parametrize("value", [-7.1, 0.0, 1 / 3])
def test_a_constant_stays_constant(value):
    image = torch.zeros(3, 90, 131, dtype=torch.uint8)
    output = predict_in_tiles(
        lambda tiles: torch.full((len(tiles), 1, *tiles.shape[2:]), value), image, tile=32, overlap=0.3, batch=fixed(4)
    )
    assert torch.equal(output, torch.full((1, 90, 131), value))


@pytest.mark.parametrize(("size", "tile"), [(64, 64), (65, 64), (1000, 64), (17, 5), (9, 1)])
@pytest.mark.parametrize("step", [0.01, 0.3, 0.5, 1.0])
def test_every_pixel_has_weight(size, tile, step):
    starts = tile_starts(size, tile, step)
    total = torch.zeros(size, dtype=torch.float64)
    for start, weights in zip(starts, _axis_weights(size, tile, starts), strict=True):
        assert (weights > 0).all()
        total[start : start + tile] += weights
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-13, rtol=0)


@pytest.mark.parametrize("step", [0.2, 0.5, 0.75, 1.0])
def test_tiles_cover_the_axis_in_steps_of_at_most_the_share(step):
    for size in range(64, 400, 7):
        starts = tile_starts(size, 64, step)
        assert starts[0] == 0
        assert starts[-1] == size - 64
        gaps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
        assert max(gaps, default=0) <= 64 * step + 1  # rounding moves a start by half a pixel at most
        assert max(gaps, default=0) - min(gaps, default=0) <= 1  # evenly spread
        assert len(starts) == 1 or (size - 64) / (len(starts) - 2 or 1e-9) > 64 * step  # and not one too many


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (1, 8), (512, 512)])
def test_window_is_one_at_its_centre_and_falls_to_every_side(height, width):
    window = gaussian_window(height, width)
    assert window.shape == (height, width)
    assert window[height // 2, width // 2] == 1 == window.max()
    assert window.min() > 0
    for row in (window[height // 2], window[:, width // 2]):
        centre = len(row) // 2
        assert (row[: centre + 1].diff() > 0).all()
        assert (row[centre:].diff() < 0).all()


@pytest.fixture(scope="module")
def network() -> UNet:
    """Transposed convolutions: the share of a pixel in a bilinear enlargement depends on the size of the tile."""
    torch.manual_seed(0)
    return UNet(base_channels=4, depth=3, up="transposed").eval().requires_grad_(False)


def test_batch_size_does_not_change_the_result(network):
    """To 1e-6 of float32: the convolutions of another batch may add in another order."""
    torch.manual_seed(1)
    image = torch.rand(3, 100, 130)
    one, *others = (predict_in_tiles(network, image, tile=48, overlap=0.5, batch=fixed(size)) for size in (1, 4, 100))
    for other in others:
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)


def test_running_out_of_memory_does_not_change_the_result(network):
    def limited(tiles: torch.Tensor) -> torch.Tensor:
        if len(tiles) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return network(tiles)

    torch.manual_seed(1)
    image = torch.rand(3, 100, 130)
    batch = fixed(8)
    output = predict_in_tiles(limited, image, tile=48, overlap=0.5, batch=batch)
    assert batch.size == 2
    expected = predict_in_tiles(network, image, tile=48, overlap=0.5, batch=fixed(1))
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


def test_tiles_equal_the_whole_image_beyond_the_receptive_field(network):
    """Of 51 pixels at most: 30 down, 14 up, 7 of the pooling. Starts are multiples of 8, so that pools fall alike."""
    torch.manual_seed(1)
    image = torch.rand(3, 32, 384)
    whole = network(image[None])[0]
    tiled = predict_in_tiles(network, image, tile=256, overlap=0.5, batch=fixed(1))
    assert tile_starts(384, 256, 0.5) == [0, 128]
    alike = [slice(0, 128), slice(128 + 51, 256 - 51), slice(256, 384)]  # far from every edge that is not the image's
    for columns in alike:
        torch.testing.assert_close(tiled[..., columns], whole[..., columns], atol=1e-5, rtol=0)
    assert (tiled - whole).abs().max() > 1e-4  # closer by, tiles do see less: or nothing was compared


def test_the_middle_of_a_tile_counts_most():
    """A network that says how far it is from its tile's edge: the blend is far above the mean of the tiles."""
    distance = torch.minimum(torch.arange(64.0), torch.arange(63.0, -1, -1))
    image = torch.zeros(1, 64, 320)
    output = predict_in_tiles(
        lambda tiles: distance.expand(len(tiles), 1, 64, 64), image, tile=64, overlap=0.5, batch=fixed(1)
    )
    inner = output[0, 0, 32:-32]
    assert inner.min() > 15.49  # two tiles of equal say give 15.5 everywhere
    assert inner.mean() > 22


def test_a_photo_of_24_megapixels_in_bounded_memory():
    """Nine bytes per pixel and a batch of tiles: neither all tiles nor the photo as float at once."""
    if sys.platform != "linux":
        pytest.skip("the peak of the resident memory can be reset on Linux only")
    photo = torch.zeros(3, 4000, 6000, dtype=torch.uint8)
    photo[:, 1000:1100, 2000:2100] = 200  # written to: pages of zeros take no memory
    before = _peak_megabytes(reset=True)
    output = predict_in_tiles(lambda tiles: tiles[:, :1], photo, tile=512, overlap=0.25, batch=fixed(8))
    growth = _peak_megabytes() - before
    assert torch.equal(output[0] > 0, photo[0] > 0)
    assert growth < 24 * (8 + 4) * 1.1 + 50, f"{growth:.0f} MB"


def _peak_megabytes(*, reset: bool = False) -> float:
    """Of this process's resident memory, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tile": 0}, "tile"), ({"overlap": 1.0}, "overlap"), ({"overlap": -0.1}, "overlap"), ({"tile": 1.5}, "tile")],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict_in_tiles(lambda tiles: tiles, torch.zeros(1, 8, 8), batch=fixed(1), **arguments)


@pytest.mark.parametrize("shape", [(8, 8), (1, 3, 8, 8), (3, 0, 8)])
def test_an_image_of_another_shape(shape):
    with pytest.raises(ValueError, match="image must have shape"):
        predict_in_tiles(lambda tiles: tiles, torch.zeros(shape), batch=fixed(1))


def test_a_tile_that_exceeds_the_axis():
    with pytest.raises(ValueError, match="64 pixels does not fit into 63"):
        tile_starts(63, 64, 0.5)
