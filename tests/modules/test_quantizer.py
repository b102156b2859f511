import pytest
import torch
import torch.nn.functional as F

from modules import quantizer
from modules.quantizer import RandomProjectionVectorQuantizer, nearest_codes
from tests.modules.device_waits import NoValueIsAsked


def by_distance(module: RandomProjectionVectorQuantizer, features: torch.Tensor) -> torch.Tensor:
    """The definition: Euclidean distances to all codes, (B, F, T) -> (B, T / K, N)."""
    steps, books = module.combine_time_steps, module.num_books
    codes = []
    for frames in features.transpose(1, 2).split(steps, 1):  # K frames, (B, K, F)
        vectors = F.normalize((frames.flatten(1) @ module.proj.weight.T).unflatten(1, (books, -1)), dim=-1)
        distance = (vectors[:, :, None].double() - module.codebooks).norm(dim=-1)  # (B, N, C)
        codes.append(distance.argmin(-1))
    return torch.stack(codes, 1)


def make(**options) -> RandomProjectionVectorQuantizer:
    torch.manual_seed(0)
    return RandomProjectionVectorQuantizer(**{"feat_in": 6, "code_dim": 4, "num_classes": 50} | options)


@pytest.mark.parametrize("dist_fn", ["l2", "cosine"])
@pytest.mark.parametrize(("books", "steps"), [(1, 8), (3, 4), (2, 1)])
def test_nearest_by_distance(dist_fn, books, steps):
    module = make(num_books=books, combine_time_steps=steps, dist_fn=dist_fn)
    features = torch.randn(3, 6, 32)
    codes = module(features)
    assert codes.dtype == torch.int64 and codes.shape == (3, 32 // steps, books)
    assert torch.equal(codes, by_distance(module, features))


def test_long_input_is_searched_in_parts(monkeypatch):
    module = make(num_books=2)
    features = torch.randn(2, 6, 400)
    whole = module(features)
    sizes, addmm = [], torch.addmm

    def recorded(*arguments):
        scores = addmm(*arguments)
        sizes.append(scores.nbytes)
        return scores

    monkeypatch.setattr(torch, "addmm", recorded)
    monkeypatch.setattr(quantizer, "MAX_SCORE_BYTES", 7 * 50 * 8)
    assert torch.equal(module(features), whole)
    assert len(sizes) == 2 * 15 and max(sizes) == 7 * 50 * 8  # 100 rows by 7, for both books


def test_silence_has_the_code_of_least_length():
    """A vector of zeros is equally far from all codes but for their last bits, and NeMo takes the nearest."""
    codebooks = make(num_books=2).codebooks.detach()
    assert torch.equal(nearest_codes(torch.zeros(3, 2, 4), codebooks), codebooks.norm(dim=2).argmin(1).expand(3, 2))


def test_frames_are_joined_in_time_order():
    """Frame 0's features come first: a projection that sees the last frame only sees nothing of the others."""
    module = make(combine_time_steps=4)
    module.proj.weight[:, :18] = 0
    features = torch.randn(1, 6, 8)
    changed = features.clone()
    changed[:, :, [0, 1, 2, 4, 5, 6]] += 5
    assert torch.equal(module(changed), module(features))
    changed[:, :, 3] = -changed[:, :, 3]
    assert not torch.equal(module(changed), module(features))


def test_time_ahead():
    features = torch.randn(2, 6, 16)
    assert torch.equal(make(time_ahead=True)(features.transpose(1, 2)), make()(features))


@pytest.mark.parametrize(("books", "shape"), [(1, (2, 2)), (2, (2, 2, 2))])
def test_squeeze_single(books, shape):
    assert make(num_books=books, squeeze_single=True)(torch.randn(2, 6, 16)).shape == shape


def test_codes_do_not_depend_on_scale_or_neighbours():
    module = make()
    features = torch.randn(3, 6, 64)
    codes = module(features)
    assert torch.equal(module(features * 100), codes)
    assert torch.equal(module(features[1:2, :, :24]), codes[1:2, :3])


def test_initialisation():
    module = make(feat_in=40, code_dim=16, num_books=2, num_classes=1000)
    assert module.codebooks.dtype == torch.float64 and module.codebooks.shape == (2, 1000, 16)
    torch.testing.assert_close(module.codebooks.norm(dim=2), torch.ones(2, 1000, dtype=torch.float64))
    assert module.codebooks.mean().item() == pytest.approx(0, abs=0.01)
    assert module.proj.weight.std().item() == pytest.approx((2 / (40 * 8 + 32)) ** 0.5, rel=0.05)
    assert set(module.state_dict()) == {"proj.weight", "codebooks"}
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    """A model that is cast casts its codebooks too."""
    module, features = make(num_books=2), torch.randn(4, 6, 400)
    same = module.to(dtype)(features.to(dtype)) == make(num_books=2)(features)
    assert same.float().mean() > 0.9  # rounded projections and codes: a few neighbours


def test_autocast_changes_nothing():
    module, features = make(), torch.randn(4, 6, 400)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(features), make()(features))


def test_nothing_waits_for_the_device():
    with NoValueIsAsked():
        make(num_books=2)(torch.randn(2, 6, 16))


def test_frames_that_do_not_divide():
    with pytest.raises(ValueError, match="^combine_time_steps=8 does not divide the 12 frames .* pad_to"):
        make()(torch.randn(1, 6, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dist_fn": "l1"}, "^dist_fn must be one of l2, cosine, got 'l1'"),
        ({"num_books": 0}, "^num_books must be a whole number of at least 1, got 0"),
        ({"combine_time_steps": 2.0}, "^combine_time_steps must be a whole number"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_option_without_effect():
    with pytest.warns(UserWarning, match="freeze=false has no effect"):
        make(freeze=False)
