"""Frame by frame against the whole recording at once."""

import onnxruntime
import pytest
import torch

from modules.conv_tasnet import ConvTasNet
from modules.conv_tasnet_stream import ConvTasNetStream, separate_stream

TINY = dict(
    num_filters=8, kernel_size=4, bottleneck_channels=6, hidden_channels=10, skip_channels=5, num_blocks=3,
    num_repeats=1, norm="cumulative", causal=True,
)  # fmt: skip
CASES = {
    "cumulative": {},
    "per frame": {"norm": "per_frame"},
    "one filter tap": {"kernel_size": 2, "block_kernel_size": 1},
    "even kernels": {"kernel_size": 16, "block_kernel_size": 2, "mask": "sigmoid"},
    "no skip, relu encoder": {"skip_channels": None, "encoder_activation": "relu", "mask": "softmax", "num_sources": 3},
}


def build(**arguments) -> ConvTasNet:
    torch.manual_seed(0)
    network = ConvTasNet(**TINY | arguments)
    for parameter in network.parameters():  # defaults such as a gain of one would hide a missing multiplication
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("frames_per_call", [1, 7])
@pytest.mark.parametrize("name", CASES)
def test_stream_equals_the_whole(name, frames_per_call, dtype, tolerance):
    network = build(**CASES[name]).to(dtype)
    for num_samples in (1, 41):
        mixture = torch.randn(2, num_samples, dtype=dtype)
        output = separate_stream(network, mixture, frames_per_call=frames_per_call)
        torch.testing.assert_close(output, network(mixture), atol=tolerance, rtol=0)


@torch.inference_mode()
def test_calls_may_be_cut_anywhere():
    stream = ConvTasNetStream(build().double())
    mixture = torch.randn(2, 40, dtype=torch.float64)
    whole, expected_state = stream(mixture, stream.initial_state(2))
    pieces, state = [], stream.initial_state(2)
    for samples in mixture.split([2, 14, 4, 20], -1):
        piece, state = stream(samples, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, -1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, expected_state, atol=1e-12, rtol=0)


@torch.inference_mode()
def test_output_is_behind_by_the_delay_and_never_changes_what_came():
    """What a call gives is final: the offline result, `delay_samples` late. The state given is left as it was."""
    network = build().double()
    stream = ConvTasNetStream(network)
    mixture = torch.randn(1, 40, dtype=torch.float64)
    state = stream.initial_state(1)
    before = {name: value.clone() for name, value in state.items()}
    output, _ = stream(mixture, state)
    torch.testing.assert_close(state, before, atol=0, rtol=0)
    assert stream.delay_samples == 2
    torch.testing.assert_close(output[..., 2:], network(mixture)[..., :-2], atol=1e-12, rtol=0)


def test_state_holds_totals_in_float64_and_what_the_convolutions_look_back_on():
    state = ConvTasNetStream(build(num_blocks=2)).initial_state(3)
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "mixture": ((3, 2), torch.float32),
        "sources": ((3, 2, 2), torch.float32),
        "separator.input_norm": ((3, 3), torch.float64),
        "separator.blocks.0.expand_norm": ((3, 3), torch.float64),
        "separator.blocks.0.depthwise": ((3, 10, 2), torch.float32),
        "separator.blocks.0.depthwise_norm": ((3, 3), torch.float64),
        "separator.blocks.1.expand_norm": ((3, 3), torch.float64),
        "separator.blocks.1.depthwise": ((3, 10, 4), torch.float32),
        "separator.blocks.1.depthwise_norm": ((3, 3), torch.float64),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"causal": False}, "this network has causal: false and norm: cumulative"),
        ({"norm": "global"}, "this network has causal: true and norm: global"),
        ({"padding": "valid"}, "this network has padding: valid, stride: 2, kernel_size: 4"),
        ({"stride": 4}, "this network has padding: centered, stride: 4, kernel_size: 4"),
        ({"kernel_size": 5}, "this network has padding: centered, stride: 2, kernel_size: 5"),
    ],
)
def test_other_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        separate_stream(build(**arguments), torch.zeros(1, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(8,), (1, 0), (1, 3), (1, 1, 4)])
def test_wrong_samples(shape):
    stream = ConvTasNetStream(build())
    with pytest.raises(ValueError, match=r"samples must have shape \(batch, multiple of 2\)"):
        stream(torch.zeros(shape), stream.initial_state())


@pytest.mark.parametrize("frames_per_call", [0, 1.5])
def test_wrong_frames_per_call(frames_per_call):
    with pytest.raises(ValueError, match="frames_per_call must be a whole number of at least 1"):
        separate_stream(build(), torch.zeros(1, 8), frames_per_call=frames_per_call)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_step():
    """One step, state in and state out, as onnxruntime would run it live."""
    network = build(num_blocks=2)
    stream = ConvTasNetStream(network).eval()
    state = stream.initial_state()
    example = {"samples": torch.randn(1, 6), "state": state}
    program = torch.onnx.export(stream, (), kwargs=example, opset_version=18, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    mixture = torch.randn(1, 60)
    values, pieces = [value.numpy() for value in state.values()], []
    for samples in mixture.split(6, -1):
        piece, *values = session.run(None, dict(zip(names, [samples.numpy(), *values], strict=True)))
        pieces.append(torch.from_numpy(piece))
    torch.testing.assert_close(torch.cat(pieces, -1)[..., 2:], network(mixture)[..., :-2], atol=1e-5, rtol=0)
