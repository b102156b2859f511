"""DeepVQE against what the paper and the public implementations say, and against what must hold."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from modules import cpu_layers, deepvqe
from modules.deepvqe import (
    RESIDUALS,
    SUBPIXELS,
    Bottleneck,
    DecoderBlock,
    DeepVQE,
    EncoderBlock,
    SubpixelConv,
    compress_spectrum,
)

TINY = dict(
    num_bins=17, mic_channels=(3, 4, 5), far_channels=(2, 4), decoder_channels=(4, 3), gru_hidden=6, align_hidden=3,
    max_delay_frames=5,
)  # fmt: skip
SMALL = dict(mic_channels=(16, 40, 56, 24), far_channels=(8, 24), decoder_channels=(40, 32, 32), align_hidden=8,
             residual="inner_decoder")  # fmt: skip


def make_network(**arguments) -> DeepVQE:
    """A tiny network in float64 and evaluation, with weights and statistics that leave nothing at its default."""
    torch.manual_seed(0)
    network = DeepVQE(**TINY | {"init_identity": False} | arguments).double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor += 0.3 * torch.randn_like(tensor)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def make_input(num_frames: int = 14, batch: int = 2, num_bins: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mic, far = (torch.randn(batch, num_bins, num_frames, 2, dtype=torch.float64) for _ in range(2))
    return mic.requires_grad_(), far.requires_grad_()


@pytest.mark.parametrize("compression", [0.3, 0.5, 1.0])
def test_compression_keeps_the_phase(compression):
    spectrum = torch.randn(2, 5, 6, 2)
    before, after = torch.view_as_complex(spectrum), compress_spectrum(spectrum, compression)
    after = torch.complex(after[:, 0], after[:, 1]).transpose(1, 2)
    torch.testing.assert_close(after.abs(), before.abs() ** compression)
    torch.testing.assert_close(after.angle(), before.angle())


def test_compression_of_silence():
    spectrum = torch.zeros(1, 5, 6, 2, requires_grad=True)
    features = compress_spectrum(spectrum)
    assert features.eq(0).all()
    (gradient,) = torch.autograd.grad(features.sum(), spectrum)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1e-6**-0.7))


def test_float32_features_under_autocast():
    spectrum = torch.randn(1, 5, 6, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compress_spectrum(spectrum), compress_spectrum(spectrum.float()))


def literal_conv(x: torch.Tensor, conv: torch.nn.Conv2d, stride: int = 1) -> torch.Tensor:
    """(B, C, T, F): taps 3 to 0 frames back, and the bin below, itself, the bin above."""
    frames, padded = x.shape[2], F.pad(x, (1, 1, 3, 0))
    taps = (
        torch.einsum("oc,bctf->botf", conv.weight[:, :, i, j], padded[:, :, i : i + frames, j : j + x.shape[3]])
        for i in range(4)
        for j in range(3)
    )
    return (sum(taps) + conv.bias[:, None, None])[..., ::stride]


def literal_norm_elu(x: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
    mean, deviation, weight, bias = (
        v[:, None, None] for v in (norm.running_mean, (norm.running_var + norm.eps).sqrt(), norm.weight, norm.bias)
    )
    x = (x - mean) / deviation * weight + bias
    return torch.where(x > 0, x, x.exp() - 1)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("num_bins", [1, 8, 9])
def test_encoder_block(residual, num_bins):
    block = EncoderBlock(3, 4, residual=residual).double().eval()
    x = torch.randn(2, 3, 6, num_bins, dtype=torch.float64)
    expected = literal_norm_elu(literal_conv(x, block.conv, stride=2), block.norm)
    if residual:
        expected = expected + literal_norm_elu(literal_conv(expected, block.residual.conv), block.residual.norm)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("subpixel", SUBPIXELS)
def test_decoder_block(subpixel, residual, norm):
    block = DecoderBlock(3, 2, skip_channels=4, residual=residual, subpixel=subpixel, norm=norm).double().eval()
    x, skip = (torch.randn(2, channels, 6, 5, dtype=torch.float64) for channels in (3, 4))
    expected = x + torch.einsum("oc,bctf->botf", block.skip.weight[..., 0, 0], skip) + block.skip.bias[:, None, None]
    if residual:
        expected = expected + literal_norm_elu(literal_conv(expected, block.residual.conv), block.residual.norm)
    values = literal_conv(expected, block.subpixel.conv)
    expected = torch.empty(2, 2, 6, 10, dtype=torch.float64)
    for r in (0, 1):
        half = slice(r, None, 2) if subpixel == "interleave" else slice(5 * r, 5 * r + 5)
        expected[..., half] = values[:, 2 * r : 2 * r + 2]
    expected = literal_norm_elu(expected, block.norm) if norm else expected
    torch.testing.assert_close(block(x, skip), expected)


@pytest.mark.parametrize(
    ("subpixel", "reached"), [("interleave", [4, 5, 6, 7, 8, 9]), ("concat", [2, 3, 4, 19, 20, 21])]
)
def test_interleaving_keeps_bins_where_they_are(subpixel, reached):
    conv = SubpixelConv(1, 2, subpixel=subpixel)
    x = torch.zeros(1, 1, 4, 17)
    x[..., 3] = 1
    difference = (conv(x) - conv(torch.zeros_like(x))).abs().amax((0, 1, 2))
    assert difference.nonzero().flatten().tolist() == reached


def test_bottleneck_reads_channels_before_bins():
    bottleneck = Bottleneck(12, 5)
    x = torch.randn(2, 3, 7, 4)
    frames = torch.stack([x[:, c, :, f] for c in range(3) for f in range(4)], -1)  # (B, T, C * F)
    expected = bottleneck.linear(bottleneck.gru(frames)[0])
    torch.testing.assert_close(bottleneck(x)[:, 2, :, 1], expected[..., 9])


def literal_network(network: DeepVQE, mic: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """The mask's 27 channels of a network of three microphone and two far-end blocks."""
    (mic_1, mic_2, mic_3), (far_1, far_2), (deep, middle, top) = (
        network.mic_encoder,
        network.far_encoder,
        network.decoder,
    )
    e1 = mic_1(compress_spectrum(mic))
    e2 = mic_2(e1)
    aligned, _ = network.alignment(e2, far_2(far_1(compress_spectrum(far))))
    e3 = mic_3(torch.cat([e2, aligned], 1))
    d3 = deep(network.bottleneck(e3), e3)[..., : e2.shape[3]]
    d2 = middle(d3, e2)[..., : e1.shape[3]]
    return top(d2, e1)[..., : mic.shape[1]]


@pytest.mark.parametrize("num_bins", [16, 17, 5, 6, 7])
def test_blocks_are_joined_as_in_the_paper(num_bins, monkeypatch):
    network, (mic, far) = make_network(num_bins=num_bins), make_input(num_bins=num_bins)
    monkeypatch.setattr("modules.deepvqe.complex_convolving_mask", lambda mask, spectrum: mask)
    mask, distribution = network(mic, far)
    assert mask.shape == (2, 27, 14, num_bins)
    assert distribution.shape == (2, 14, 5)
    torch.testing.assert_close(mask, literal_network(network, mic, far))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"subpixel": "concat"}, {"align_mask_start": True, "residual": "inner_decoder"}, {"mask_norm": True}],
    ids=str,
)
@pytest.mark.parametrize("which", [0, 1])
def test_causal_in_each_input(which, arguments):
    network, inputs = make_network(**arguments), make_input()
    changed = [x.detach().clone() for x in inputs]
    changed[which][:, :, 9:] += 1
    before, after = network(*inputs)[0], network(*changed)[0]
    torch.testing.assert_close(before[:, :, :9], after[:, :, :9], atol=1e-12, rtol=0)
    assert (before[:, :, 9] - after[:, :, 9]).abs().max() > 1e-6
    (gradient,) = torch.autograd.grad(before[:, :, :9].square().sum(), inputs[which])
    assert gradient[:, :, 9:].eq(0).all()
    assert gradient[:, :, 8].abs().max() > 0


@pytest.mark.parametrize("subpixel", SUBPIXELS)
@pytest.mark.parametrize("num_bins", [16, 17])
@pytest.mark.parametrize("training", [True, False])
def test_begins_with_the_microphone(subpixel, num_bins, training):
    network = DeepVQE(**TINY | {"subpixel": subpixel, "num_bins": num_bins}).train(training)
    mic, far = (100 * x.detach().float() for x in make_input(num_bins=num_bins))
    enhanced, _ = network(mic, far)
    torch.testing.assert_close(enhanced, mic, atol=1e-6, rtol=1e-6)
    enhanced.square().sum().backward()
    gradient = network.decoder[-1].subpixel.conv.weight.grad  # through which all the rest comes to life
    assert gradient.flatten(1).abs().amax(1).min() > 0


def test_a_norm_on_the_mask():
    with pytest.warns(UserWarning, match="init_identity has no effect with mask_norm"):
        network = DeepVQE(**TINY, mask_norm=True)
    assert network.decoder[-1].norm is not None
    masks = []
    network.decoder[-1].register_forward_hook(lambda module, inputs, output: masks.append(output))
    network(*(x.detach().float() for x in make_input()))
    assert -1 <= masks[0].min() < 0


def test_noise_suppression_alone():
    network = make_network(far_channels=())
    mic, far = make_input()
    enhanced, distribution = network(mic)
    assert distribution is None
    assert torch.equal(network(mic, far)[0], enhanced)
    assert not [name for name in network.state_dict() if re.match("far_encoder|alignment", name)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("identity", [True, False])
def test_silence(training, identity):
    network = make_network(init_identity=identity).float().train(training)
    mic, far = (torch.zeros(2, 17, 14, 2, requires_grad=True) for _ in range(2))
    enhanced, _ = network(mic, far)
    assert enhanced.eq(0).all()
    enhanced.sum().backward()
    gradients = [mic.grad, far.grad, *(p.grad for p in network.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) < 1e7


def test_silent_far_end():
    network, (mic, _) = make_network(), make_input()
    far = torch.zeros_like(mic, requires_grad=True)
    enhanced, distribution = network(mic, far)
    assert enhanced.isfinite().all()
    torch.testing.assert_close(distribution.sum(-1), torch.ones(2, 14, dtype=torch.float64))
    enhanced.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [mic, far, *network.parameters()])


@pytest.mark.parametrize("num_frames", [1, 3, 14])  # fewer than delays too
def test_batch_items_do_not_meet(num_frames):
    network, (mic, far) = make_network(), make_input(num_frames, batch=3)
    alone = torch.cat([network(mic[i : i + 1], far[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(network(mic, far)[0], alone, atol=1e-12, rtol=0)


def test_bfloat16_autocast():
    torch.manual_seed(0)
    network = DeepVQE(**TINY | {"init_identity": False})
    mic, far = (x.detach().float() for x in make_input())
    expected, _ = network(mic, far)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enhanced, distribution = network(mic, far)
    assert enhanced.dtype == distribution.dtype == torch.float32
    assert (enhanced - expected).abs().max() < 0.1 * expected.abs().max()
    enhanced.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(num_bins=257, gru_hidden=576), 7_975_063),  # a public implementation
        (dict(num_bins=257, gru_hidden=512), 7_470_871),
        (dict(num_bins=241, gru_hidden=512), 7_208_599),
        (dict(num_bins=161, gru_hidden=384), 5_946_007),
        (dict(num_bins=257, gru_hidden=576, far_channels=(), mask_norm=True), 7_509_996),  # another one
        (dict(num_bins=257, gru_hidden=576, far_channels=()), 7_509_996 - 54),
        (SMALL | dict(num_bins=241, gru_hidden=160), 530_735),
        (SMALL | dict(num_bins=241, gru_hidden=183), 589_868),  # 0.59 M in the paper
        (SMALL | dict(num_bins=241, gru_hidden=192), 613_871),
    ],
)
def test_number_of_parameters(arguments, expected):
    with torch.device("meta"):
        network = DeepVQE(**{"init_identity": False} | arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def block_names(prefix: str, *, residual: bool, norm: bool = True, decoder: bool = False) -> list[str]:
    convs = ["skip", "subpixel.conv"] if decoder else ["conv"]
    convs += ["residual.conv"] if residual else []
    norms = (["norm"] if norm else []) + (["residual.norm"] if residual else [])
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{prefix}.{conv}.{kind}" for conv in convs for kind in ("weight", "bias")] + [
        f"{prefix}.{norm}.{kind}" for norm in norms for kind in kinds
    ]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("mask_norm", [True, False])
def test_state_dict_names_are_frozen(residual, mask_norm):
    """Checkpoints hold these names: a change needs a migration of old ones."""
    network = make_network(residual=residual, mask_norm=mask_norm)
    everywhere = residual == "all"
    expected = ["alignment.temperature", "bottleneck.linear.weight", "bottleneck.linear.bias"]
    expected += [f"bottleneck.gru.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh")]
    for name in ("mic_projection", "far_projection", "score_conv"):
        expected += [f"alignment.{name}.weight", f"alignment.{name}.bias"]
    for name in ["mic_encoder.0", "mic_encoder.1", "mic_encoder.2", "far_encoder.0", "far_encoder.1"]:
        expected += block_names(name, residual=everywhere)
    for index, (has_residual, norm) in enumerate([(everywhere, True), (True, True), (everywhere, mask_norm)]):
        expected += block_names(f"decoder.{index}", residual=has_residual, norm=norm, decoder=True)
    assert sorted(network.state_dict()) == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mic_channels": ()}, "mic_channels must not be empty"),
        ({"mic_channels": (3, 0, 5)}, r"mic_channels\[1\] must be a whole number of at least 1, got 0"),
        ({"far_channels": (2, 2.5)}, r"far_channels\[1\] must be a whole number of at least 1, got 2.5"),
        ({"far_channels": (2, 4, 4)}, "far_channels must be shorter than the 3 of mic_channels, got 3"),
        ({"decoder_channels": (4, 3, 27)}, "decoder_channels must be 2, one fewer than mic_channels, got 3"),
        ({"num_bins": 4}, "num_bins must be above 4 to be halved 3 times"),
        ({"gru_hidden": 0}, "gru_hidden must be a whole number"),
        ({"max_delay_frames": 0}, "max_delay_frames must be a whole number of at least 1, got 0"),
        ({"residual": "none"}, "residual must be one of all, inner_decoder, got 'none'"),
        ({"subpixel": "shuffle"}, "subpixel must be one of interleave, concat, got 'shuffle'"),
        ({"compression": 1.5}, "compression must be above 0 and at most 1"),
        ({"align_temperature": math.nan}, "align_temperature must be above 0$"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        DeepVQE(**TINY | arguments)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_named_together():
    with pytest.raises(ValueError, match="num_bins .* '17'; decoder_channels .* 1; residual .*'x'; compression"):
        DeepVQE(**TINY | {"num_bins": "17", "decoder_channels": (3,), "residual": "x", "compression": 0})  # type: ignore


def test_wrong_input():
    network = DeepVQE(**TINY)
    mic = torch.zeros(1, 17, 5, 2)
    with pytest.raises(ValueError, match=r"mic must have shape \(batch, 17, frames, 2\), got \(1, 5, 17, 2\)"):
        network(mic.transpose(1, 2), mic)
    with pytest.raises(ValueError, match="needs the far end"):
        network(mic)
    with pytest.raises(ValueError, match=r"far must have the shape of mic, \(1, 17, 5, 2\), got \(1, 17, 4, 2\)"):
        network(mic, mic[:, :, 1:])
    with pytest.raises(ValueError, match="subpixel must be one of"):
        SubpixelConv(1, 1, subpixel="shuffle")


@pytest.mark.parametrize("arguments", [{}, {"subpixel": "concat"}, {"mask_norm": True}, {"residual": "inner_decoder"}])
@pytest.mark.parametrize("num_bins", [17, 32])
def test_training_on_a_cpu_gives_the_numbers_of_training_elsewhere(arguments, num_bins, monkeypatch):
    mic, far = make_input(num_bins=num_bins)
    found = []
    for cpu in (True, False):
        if not cpu:
            for module in (deepvqe, cpu_layers):
                monkeypatch.setattr(module, "trains_on_cpu", lambda *_: False)
        network = make_network(num_bins=num_bins, **arguments).train()
        output, delays = network(mic, far)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append([output, delays, *(parameter.grad for parameter in network.parameters())])
    for here, elsewhere in zip(*found, strict=True):
        torch.testing.assert_close(here, elsewhere, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("subpixel", SUBPIXELS)
def test_training_on_a_cpu_keeps_channels_last_there_and_back(subpixel):
    network = make_network(subpixel=subpixel).train()
    wrong = []

    def check(name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            wrong.append(name)

    for name, layer in network.named_modules():
        if isinstance(layer, (torch.nn.BatchNorm2d, deepvqe.CausalConv)):

            def look(layer, inputs, output, name=name):
                check(f"{name} input", inputs[0])
                check(f"{name} output", output)
                output.register_hook(lambda gradient: check(f"gradient of {name}", gradient))

            layer.register_forward_hook(look)
    network(*make_input())[0].sum().backward()
    assert not wrong
