"""The alignment against the literal form, which unfolds the far end over all delays, and with known delays."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from modules.alignment import SoftAlignment, banded_scores, banded_sum

SIZES = [(24, 10), (40, 10), (37, 10), (15, 10), (14, 10), (5, 10), (1, 1), (1, 4), (30, 1), (9, 9), (25, 10)]


def unfolded(x: torch.Tensor, num_delays: int) -> torch.Tensor:
    """(B, C, T, F) -> (B, C, T, F, D), index d the frame d before, zeros before the first."""
    return F.pad(x, (0, 0, num_delays - 1, 0)).unfold(2, num_delays, 1).flip(-1)


def literal_alignment(module: SoftAlignment, mic: torch.Tensor, far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query = module.mic_projection(mic)
    keys = unfolded(module.far_projection(far), module.max_delay_frames).contiguous()
    scores = (query.unsqueeze(-1) * keys).sum(3)  # (B, H, T, D)
    if module.scale:
        scores = scores / math.sqrt(mic.shape[3])
    weight, bias = module.score_conv.weight, module.score_conv.bias
    logits = F.conv2d(F.pad(scores, (1, 1, 4, 0)), weight, bias)[:, 0] / module.temperature
    if module.mask_start:
        for t in range(min(mic.shape[2], module.max_delay_frames)):
            logits[:, t, t + 1 :] = -torch.inf
    distribution = logits.softmax(-1)  # (B, T, D)
    values = unfolded(far, module.max_delay_frames).contiguous()
    return (values * distribution[:, None, :, None]).sum(-1), distribution


def make_module(num_delays: int = 10, **arguments) -> SoftAlignment:
    torch.manual_seed(0)
    sizes = {"mic_channels": 5, "far_channels": 4, "hidden_channels": 3, "max_delay_frames": num_delays}
    return SoftAlignment(**sizes | arguments).double()


def make_input(num_frames: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mic, far = (torch.randn(batch, channels, num_frames, 6, dtype=torch.float64) for channels in (5, 4))
    return mic.requires_grad_(), far.requires_grad_()


def finder(num_delays: int, channels: int = 4) -> SoftAlignment:
    """Identity projections, and a score convolution of its centre tap alone: the logits are the products."""
    module = make_module(
        num_delays, mic_channels=channels, far_channels=channels, hidden_channels=channels, scale=False
    )
    for projection in (module.mic_projection, module.far_projection):
        projection.weight.data.copy_(torch.eye(channels)[:, :, None, None])
        projection.bias.data.zero_()
    module.score_conv.weight.data.zero_()
    module.score_conv.weight.data[:, :, 4, 1] = 1
    return module


@pytest.mark.parametrize(("num_frames", "num_delays"), SIZES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"scale": False, "mask_start": True, "temperature": 0.3}],
    ids=["default", "unscaled, masked, sharp"],
)
def test_value_and_gradient_equal_the_literal_form(num_frames, num_delays, arguments):
    module, inputs = make_module(num_delays, **arguments), make_input(num_frames)
    outputs = module(*inputs), literal_alignment(module, *inputs)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(outputs[0][1].sum(-1), torch.ones(2, num_frames, dtype=torch.float64))
    weights = [torch.randn_like(x) for x in outputs[0]]
    variables = [*inputs, *module.parameters()]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(output, weights, strict=True)), variables)
        for output in outputs
    ]
    torch.testing.assert_close(*gradients)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, in the backward pass too."""

    elements = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking for it imports the compiler: seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in tree_flatten(output)[0]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return output


def largest(function, *inputs: torch.Tensor) -> tuple[int, int]:
    with LargestTensor() as forward:
        aligned, distribution = function(*inputs)
    with LargestTensor() as backward:
        (aligned.sum() + distribution.square().sum()).backward()
    return forward.elements, backward.elements


@pytest.mark.parametrize(("num_frames", "num_delays"), [(96, 24), (110, 24), (20, 24), (300, 8)])
def test_no_tensor_over_delays_and_bins(num_frames, num_delays):
    """The literal form makes tensors of B x C x D x T x F elements; this one none beyond a few copies of its input and
    of the scores, and none of T x T."""
    batch, channels, hidden, bins = 2, 8, 4, 16
    module = SoftAlignment(
        mic_channels=channels, far_channels=channels, hidden_channels=hidden, max_delay_frames=num_delays
    )
    inputs = [torch.randn(batch, channels, num_frames, bins, requires_grad=True) for _ in range(2)]
    unfolded_size = batch * channels * num_delays * num_frames * bins
    assert min(largest(lambda mic, far: literal_alignment(module, mic, far), *inputs)) >= unfolded_size
    features, scores = (batch * num_frames * n for n in (channels * bins, hidden * num_delays))
    assert max(largest(module, *inputs)) <= 2.5 * max(features, scores) < unfolded_size / 3
    assert num_frames < 300 or 2.5 * max(features, scores) < batch * hidden * num_frames**2


def peak_bytes(function, *inputs: torch.Tensor) -> int:
    """The most that forward and backward hold at once beside inputs and weights, by the allocator's own records."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        aligned, distribution = function(*inputs)
        (aligned.sum() + distribution.square().sum()).backward()
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_peak_memory_is_a_fraction_of_the_literal_form():
    module = SoftAlignment(mic_channels=32, far_channels=32, hidden_channels=8, max_delay_frames=50)
    inputs = [torch.randn(1, 32, 200, 21, requires_grad=True) for _ in range(2)]
    literal = peak_bytes(lambda mic, far: literal_alignment(module, mic, far), *inputs)
    assert literal > 4 * 32 * 50 * 200 * 21  # bytes of one tensor over channels, delays, frames and bins
    assert peak_bytes(module, *inputs) < literal / 4


@pytest.mark.parametrize("delay", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("num_frames", [60, 64])
def test_a_delay_is_found(delay, num_frames):
    far = torch.randn(1, 4, num_frames, 6, dtype=torch.float64)
    mic = F.pad(far, (0, 0, delay, 0))[:, :, :num_frames]
    aligned, distribution = finder(10)(mic, far)
    assert (distribution[0, delay:].argmax(-1) == delay).float().mean() > 0.95
    assert distribution[0, delay:].mean(0).argmax() == delay
    found = distribution[0, :, delay] > 0.999
    assert found.sum() > num_frames / 2
    torch.testing.assert_close(aligned[0][:, found], mic[0][:, found], atol=0.05, rtol=0)


@pytest.mark.parametrize(("num_frames", "num_delays"), SIZES)
def test_one_hot_weights_select_a_frame(num_frames, num_delays):
    values = torch.randn(2, num_frames, 7)
    for delay in range(num_delays):
        weights = F.one_hot(torch.full((2, num_frames), delay), num_delays).float()
        expected = F.pad(values, (0, 0, delay, 0))[:, :num_frames]
        assert torch.equal(banded_sum(weights, values), expected)


def test_scores_of_the_present_and_the_past():
    query, key = torch.randn(2, 3, 23, 4), torch.randn(2, 3, 23, 4)
    scores = banded_scores(query, key, 5)
    for t in range(23):
        for d in range(5):
            expected = (query[:, :, t] * key[:, :, t - d]).sum(-1) if t >= d else torch.zeros(2, 3)
            torch.testing.assert_close(scores[:, :, t, d], expected)


@pytest.mark.parametrize("which", [0, 1])
def test_causal_in_each_input(which):
    module, inputs = make_module(), make_input(40)
    changed = [x.detach().clone() for x in inputs]
    changed[which][:, :, 17:] += 1
    for before, after in zip(module(*inputs), module(*changed), strict=True):
        before, after = (x if x.ndim == 3 else x.transpose(1, 2) for x in (before, after))  # (B, T, ...)
        torch.testing.assert_close(before[:, :17], after[:, :17], atol=1e-12, rtol=0)
        assert (before[:, 17] - after[:, 17]).abs().max() > 1e-6
    aligned, distribution = module(*inputs)
    early = aligned[:, :, :17].square().sum() + distribution[:, :17].square().sum()
    (gradient,) = torch.autograd.grad(early, inputs[which])
    assert gradient[:, :, 17:].eq(0).all()
    assert gradient[:, :, 16].abs().max() > 0


def test_start_may_be_masked():
    mic, far = make_input(30)
    plain, masked = (make_module(mask_start=mask_start)(mic, far)[1] for mask_start in (False, True))
    not_yet = torch.ones(30, 10, dtype=torch.bool).triu(1)  # d > t
    assert masked[:, not_yet].eq(0).all()
    assert plain[:, not_yet].gt(0).all()
    torch.testing.assert_close(masked[:, 9:], plain[:, 9:])
    torch.testing.assert_close(masked.sum(-1), torch.ones(2, 30, dtype=torch.float64))


@pytest.mark.parametrize("mask_start", [True, False])
def test_silent_far_end(mask_start):
    module = make_module(mask_start=mask_start)
    mic, far = make_input(30)[0], torch.zeros(2, 4, 30, 6, dtype=torch.float64, requires_grad=True)
    aligned, distribution = module(mic, far)
    assert aligned.eq(0).all()
    (aligned.sum() + distribution.square().sum()).backward()
    gradients = [far.grad, mic.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_batch_items_do_not_meet():
    module, (mic, far) = make_module(), make_input(33, batch=3)
    alone = [module(mic[i : i + 1], far[i : i + 1]) for i in range(3)]
    for together, single in zip(module(mic, far), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(single))


def test_temperature_is_part_of_a_checkpoint():
    module, inputs = make_module(), make_input(20)
    flat = module(*inputs)[1]
    module.temperature.fill_(0.1)
    other = make_module()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*inputs)[1], module(*inputs)[1])
    assert other(*inputs)[1].max() > flat.max()


def test_distribution_stays_float32_under_autocast():
    module, inputs = make_module().float(), [x.detach().float() for x in make_input(20)]
    expected, expected_distribution = module(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned, distribution = module(*inputs)
    assert aligned.dtype == distribution.dtype == torch.float32
    torch.testing.assert_close(distribution, expected_distribution, atol=0.02, rtol=0)
    torch.testing.assert_close(distribution.sum(-1), torch.ones(2, 20))  # to float32's precision


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_delay_frames": 0}, "max_delay_frames must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_module(**arguments)
