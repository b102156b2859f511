"""The fast layers against the stock ones, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules import cpu_layers
from modules.cpu_layers import GRU, DepthwiseConv1d, Linear, PointwiseConv1d, PReLU, linear, pointwise, two_pointwise


def assert_same(fast: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    """Same output, input gradient and parameter gradients in float64, for the same parameters."""
    fast, stock = fast.double().train(), stock.double()
    stock.load_state_dict(fast.state_dict())
    fast.zero_grad()
    inputs = [x.double().requires_grad_(), x.double().requires_grad_()]
    outputs = [layer(item) for layer, item in zip((fast, stock), inputs, strict=True)]
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-12, rtol=0)
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-11, rtol=0)


class PaddedConv1d(nn.Conv1d):
    """The stock convolution over frames with zeros around them."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, padding: tuple[int, int]) -> None:
        super().__init__(channels, channels, kernel_size, dilation=dilation, groups=channels)
        self.zeros = padding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(input, self.zeros))


@pytest.mark.parametrize(
    ("kernel_size", "causal", "before"),
    [
        (1, False, 0),
        (3, False, 1),
        (5, False, 2),
        (2, False, 0),
        (4, False, 1),
        (1, True, 0),
        (3, True, 2),
        (4, True, 3),
    ],
)
@pytest.mark.parametrize("dilation", [1, 2, 16])
@pytest.mark.parametrize("num_frames", [1, 15, 16, 50])
def test_depthwise_convolution(kernel_size, causal, before, dilation, num_frames):
    torch.manual_seed(0)
    stock = PaddedConv1d(6, kernel_size, dilation, (before * dilation, (kernel_size - 1 - before) * dilation))
    fast = DepthwiseConv1d(6, kernel_size=kernel_size, dilation=dilation, causal=causal)
    assert_same(fast, stock, torch.randn(2, 6, num_frames))
    x = torch.randn(2, 6, num_frames, dtype=torch.float64)
    torch.testing.assert_close(fast.eval()(x), fast.train()(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("slope", [0.25, 0.0, 1.0, -0.5])
def test_prelu(slope):
    torch.manual_seed(0)
    fast = PReLU()
    fast.weight.data.fill_(slope)
    x = torch.randn(2, 6, 50)
    x[0, 0, 0] = 0
    assert_same(fast, nn.PReLU(), x)
    assert_same(fast, nn.PReLU(), x.mT)  # not contiguous
    torch.testing.assert_close(fast.eval()(x.double()), fast.train()(x.double()))


def test_prelu_under_autocast_has_the_stock_dtype():
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PReLU()(x).dtype == nn.PReLU()(x).dtype


class Two(nn.Module):
    """Both convolutions, joined along the channels."""

    def __init__(self, *, joined: bool, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PointwiseConv1d(6, channels, bias=bias) for channels in (4, 3))
        self.joined = joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        return torch.cat(two_pointwise(x, first, second) if self.joined else (first(x), second(x)), 1)


@pytest.mark.parametrize("bias", [True, False])
def test_two_convolutions_over_one_input(bias: bool) -> None:
    torch.manual_seed(0)
    assert_same(Two(joined=True, bias=bias), Two(joined=False, bias=bias), torch.randn(2, 6, 50))


def test_a_replaced_convolution_is_asked_itself() -> None:
    """Nothing is known of what stands in a convolution's place."""
    first, other = PointwiseConv1d(6, 4).train(), nn.Sequential(nn.Conv1d(6, 3, 1), nn.Tanh()).train()
    x = torch.randn(2, 6, 50)
    torch.testing.assert_close(two_pointwise(x, first, other)[1], other(x), atol=0, rtol=0)


LARGE = [
    (lambda bias: Linear(128, 512, bias=bias), (3, 50, 128)),
    (lambda bias: Linear(128, 512, bias=bias), (150, 128)),
    (lambda bias: PointwiseConv1d(128, 512, bias=bias), (2, 128, 80)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("make", "shape"), LARGE)
def test_products_of_large_matrices(make, shape, bias, monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN in training; small ones, and those of evaluation, by what torch takes, to the last digit of float32."""
    torch.manual_seed(0)
    layer, results, dilations = make(bias).train(), [], []
    stock = F.conv1d, F.conv2d

    def noted(function):
        def call(*args, **kwargs):
            dilations.append(kwargs.get("dilation", 1))
            return function(*args, **kwargs)

        return call

    monkeypatch.setitem(cpu_layers._CONVOLUTIONS, 3, noted(stock[0]))
    monkeypatch.setattr(cpu_layers.F, "conv2d", noted(stock[1]))
    x = torch.randn(shape)
    weights = torch.randn_like(layer(x))
    for least in (2**22, 2**62):
        monkeypatch.setattr(cpu_layers, "_LARGE", least)
        layer.zero_grad()
        own = x.clone().requires_grad_()
        output = layer(own)
        (output * weights).sum().backward()
        results.append((output, own.grad, *(parameter.grad.clone() for parameter in layer.parameters())))
    assert 2 in dilations, "oneDNN has computed the first"
    for large, plain in zip(*results, strict=True):
        torch.testing.assert_close(large, plain, atol=2e-4 * float(plain.abs().max()), rtol=0)
    dilations.clear()
    monkeypatch.setattr(cpu_layers, "_LARGE", 1)
    layer.eval()(x)
    layer.train().double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x)
    assert 2 not in dilations
    assert layer(x).is_contiguous()


def test_products_of_images() -> None:
    """As a layer of low rank that takes a convolution's place has them."""
    layer = nn.Identity().train()
    x, weight = torch.randn(2, 64, 40, 50), torch.randn(128, 64, 1, 1)
    torch.testing.assert_close(pointwise(layer, x, weight), F.conv2d(x, weight), atol=1e-4, rtol=1e-5)
    rows = torch.randn(0, 5, 64)
    assert linear(layer, rows, weight[:, :, 0, 0]).shape == (0, 5, 128)


class States(nn.Module):
    """The states of a GRU, in each frame and after the last one, as one tensor."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        states, last = self.gru(input)
        return torch.cat([states, last.transpose(0, 1)], 1)


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 5), (3, 30, 5)])
def test_gru(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_same(States(GRU(5, 4)), States(nn.GRU(5, 4, batch_first=True)), torch.randn(shape))


def test_gru_under_autocast() -> None:
    """States stay in full precision: half of it is lost in the products alone."""
    torch.manual_seed(0)
    gru, x = GRU(8, 16), torch.randn(2, 40, 8)
    expected, _ = gru(x)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in gru.parameters()]
    gru.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = gru(x)
    states.square().sum().backward()
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, expected, atol=0.02, rtol=0)
    for parameter, gradient in zip(gru.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() < 0.02 * gradient.norm()


def test_gru_with_a_first_state_or_without_training_is_the_stock_one() -> None:
    torch.manual_seed(0)
    gru, stock = GRU(5, 4), nn.GRU(5, 4, batch_first=True)
    stock.load_state_dict(gru.state_dict())
    x, first = torch.randn(2, 6, 5), torch.randn(1, 2, 4)
    assert torch.equal(gru(x, first)[0], stock(x, first)[0])
    assert torch.equal(gru.eval()(x)[0], stock(x)[0])
