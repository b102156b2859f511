"""The training steps that benchmarks/peers.py compares, ours and others': each a network, its optimiser and a batch.

Both sides of a pair have the same batch, loss, optimiser and clipping. Where they are the same network the peer's
weights are read by ours (those of NEST the other way round), and both say what the loss of the first step is. What
belongs to one side only is imported by that side: the Python of the peers has not all that ours needs, nor the reverse.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Sizes = dict[str, Any]
OPTIMISERS: dict[str, tuple[str, dict[str, float], float]] = {  # name, its arguments, clipping; of the model files
    "conv_tasnet": ("Adam", {"lr": 1e-3}, 5.0),
    "nest": ("AdamW", {"lr": 1e-4, "weight_decay": 0.0}, 1.0),
    "unet": ("AdamW", {"lr": 1e-3, "weight_decay": 0.01}, 1.0),
    "deepvqe": ("AdamW", {"lr": 1.2e-3, "weight_decay": 5e-7}, 5.0),
    "deepvqe_alignment": ("AdamW", {"lr": 1.2e-3, "weight_decay": 5e-7}, 5.0),
}


class Job(NamedTuple):
    """What a side does again and again, and the loss of its first step by the peer that it was compared with."""

    run: Callable[[], Any]
    losses: dict[str, float]


def training(pair: str, model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step: gradients, clipping, optimiser; it gives the loss."""
    name, arguments, clip = OPTIMISERS[pair]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = getattr(torch.optim, name)(weights, **arguments)
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        return loss.detach()

    return step


def first_loss(model: nn.Module, loss_of: Callable[[], Tensor]) -> float:
    """In training mode, but without a trace in the weights or in running statistics."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)  # NEST draws its masks
    with torch.no_grad():
        loss = float(loss_of())
    model.load_state_dict(before)
    return loss


def keep_weights(side: str, model: nn.Module, work: Path, loss: float) -> dict[str, float]:
    """For ours to read. Gives the losses of a job."""
    torch.save(model.state_dict(), work / f"{side}.pt")
    return {side: loss}


def weights_of_peer(side: str, work: Path) -> dict[str, Tensor] | None:
    """None: that peer is not installed, or another one was asked for."""
    path = work / f"{side}.pt"
    return torch.load(path, map_location="cpu") if path.exists() else None


# Conv-TasNet


def conv_tasnet(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    from losses.pit import pit_neg_si_sdr

    samples = round(8000 * sizes["seconds"])
    sources = 0.1 * torch.randn(sizes["batch"], 2, samples, generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"mixture": sources.sum(1), "sources": sources}
    blocks, repeats, hidden = sizes["blocks"], sizes["repeats"], sizes["hidden"]
    if side.startswith("ours"):
        return _our_conv_tasnet(
            side, batch, {"num_blocks": blocks, "num_repeats": repeats, "hidden_channels": hidden}, work
        )
    if side == "torchaudio":
        from torchaudio.models import ConvTasNet

        layers = {"msk_num_layers": blocks, "msk_num_stacks": repeats, "msk_num_hidden_feats": hidden}
        theirs = ConvTasNet(msk_activate="relu", **layers).to(device)
        estimate = lambda: theirs(batch["mixture"].unsqueeze(1))  # noqa: E731
    else:
        from asteroid.models import ConvTasNet

        layers = {"n_blocks": blocks, "n_repeats": repeats, "hid_chan": hidden}
        theirs = ConvTasNet(n_src=2, mask_act="relu", **layers).to(device)
        estimate = lambda: theirs(batch["mixture"])  # noqa: E731
    theirs.train()

    def loss_of() -> Tensor:
        return pit_neg_si_sdr(estimate(), batch["sources"])[0].mean()

    losses = keep_weights(side, theirs, work, first_loss(theirs, loss_of))
    return Job(training("conv_tasnet", theirs, loss_of), losses)


def _our_conv_tasnet(side: str, batch: dict[str, Tensor], sizes: Sizes, work: Path) -> Job:
    from models.conv_tasnet import ConvTasNet

    losses, compile = {}, "default" if "compiled" in side else False
    for peer, padding in (("asteroid", "valid"), ("torchaudio", "centered")):
        system = ConvTasNet(**sizes, padding=padding, compile=compile).to(batch["mixture"].device).train()
        if (state := weights_of_peer(peer, work)) is not None:
            system.load_weights(system.import_weights({"state_dict": state}))
            losses[peer] = first_loss(system, lambda system=system: system.step(batch)["loss"])
    system.recompile()  # does nothing where compile is False
    return Job(training("conv_tasnet", system, lambda: system.step(batch)["loss"]), losses)


# NEST


def nest(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    generator = torch.Generator().manual_seed(0)
    samples = round(16000 * sizes["seconds"])
    clean = 0.1 * torch.randn(sizes["batch"], samples, generator=generator)
    noisy = clean + 0.03 * torch.randn(clean.shape, generator=generator)
    length = torch.full((len(clean),), samples)
    batch = {"audio": clean, "length": length, "noisy": noisy, "noisy_length": length}
    batch = {name: value.to(device) for name, value in batch.items()}
    return (_our_nest if side == "ours" else _nemo)(batch, sizes, work, device)


def _our_nest(batch: dict[str, Tensor], sizes: Sizes, work: Path, device: str) -> Job:
    from models.nest import NEST

    batch = batch | {"mask_seed": torch.arange(len(batch["audio"]), device=device)}
    encoder = {name: sizes[name] for name in ("d_model", "n_heads", "n_layers")}
    off = {"dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_emb": 0.0, "dropout_att": 0.0}
    sections = {"encoder": encoder | off, "preprocessor": {"dither": 0.0}}
    torch.manual_seed(0)
    system = NEST(**sections, optim={"name": "adamw", "lr": 1e-4})
    system.save_to(work / "nest.nemo")
    same = NEST(**sections, nemo_compat=True).to(device).train()  # draws its masks as NeMo does
    same.load_state_dict(system.state_dict())
    losses = {"NeMo": first_loss(same, lambda: same.step(batch)["loss"])}
    system.to(device)
    return Job(training("nest", system, lambda: system.step(batch)["loss"]), losses)


def _nemo(batch: dict[str, Tensor], sizes: Sizes, work: Path, device: str) -> Job:
    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    model = EncDecDenoiseMaskedTokenPredModel.restore_from(str(work / "nest.nemo"), map_location=device).train()

    def loss_of() -> Tensor:
        """As its training_step, which needs a Trainer."""
        log_probs, encoded_len, masks, tokens = model.forward(
            input_signal=batch["audio"],
            input_signal_length=batch["length"],
            noise_signal=batch["audio"],
            noise_signal_length=batch["length"],
            noisy_input_signal=batch["noisy"],
            noisy_input_signal_length=batch["noisy_length"],
            apply_mask=True,
        )
        return model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=encoded_len)

    losses = {"NeMo": first_loss(model, loss_of)}
    return Job(training("nest", model, loss_of), losses)


# UNet


def unet(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    from losses.overlap import SegmentationLoss

    generator = torch.Generator().manual_seed(0)
    shape = (sizes["batch"], 3, sizes["pixels"], sizes["pixels"])
    image = torch.rand(shape, generator=generator).to(device)
    mask = (torch.rand(shape[0], 1, *shape[2:], generator=generator) < 0.05).float().to(device)
    torch.manual_seed(0)
    if side.startswith("ours"):
        return _our_unet(side, {"image": image, "mask": mask}, sizes["base"], work)
    if side == "plain UNet":
        from benchmarks.naive_unet import NaiveUNet

        theirs: nn.Module = NaiveUNet(base_channels=sizes["base"])
        network: Callable[[Tensor], Tensor] = theirs
    else:
        import segmentation_models_pytorch as smp

        from benchmarks.naive_unet import MEAN, STD

        theirs = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        network = lambda image: theirs((image - mean) / std)  # noqa: E731
    theirs.to(device).train()
    criterion = SegmentationLoss()

    def loss_of() -> Tensor:
        return criterion(network(image), mask)["loss"]

    same = side == "plain UNet"
    losses = keep_weights(side, theirs, work, first_loss(theirs, loss_of)) if same else {}
    return Job(training("unet", theirs, loss_of), losses)


def _our_unet(side: str, batch: dict[str, Tensor], base: int, work: Path) -> Job:
    from models.unet import UNet

    up = "bilinear" if "bilinear" in side else "transposed"
    system = UNet(base_channels=base, up=up, compile="default" if "compiled" in side else False)
    system.to(batch["image"].device).train()
    losses = {}
    if up == "transposed" and (state := weights_of_peer("plain UNet", work)) is not None:
        names = system.network.state_dict()
        system.network.load_state_dict(dict(zip(names, state.values(), strict=True)))  # layers stand in the same order
        losses["plain UNet"] = first_loss(system, lambda: system.step(batch)["loss"])
    system.recompile()
    return Job(training("unet", system, lambda: system.step(batch)["loss"]), losses)


# DeepVQE


def deepvqe(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    """The literal network runs within our system: the same transforms and loss on both sides."""
    from benchmarks.naive_deepvqe import NaiveDeepVQE, weights_of
    from models.deepvqe import DeepVQE

    samples, generator = round(16000 * sizes["seconds"]), torch.Generator().manual_seed(0)
    far, near = (0.1 * torch.randn(sizes["batch"], samples, generator=generator) for _ in range(2))
    count = sizes["batch"]
    batch = {"mic": near + 0.5 * far.roll(1600, 1), "far": far, "target": near, "length": torch.full((count,), samples)}
    batch |= {"delay_samples": torch.full((count,), 1600.0), "path_change_sample": torch.full((count,), -1)}
    batch = {name: value.to(device) for name, value in (batch | {"has_target": torch.full((count,), True)}).items()}
    torch.manual_seed(0)
    align = {"max_delay_ms": sizes["max_delay_ms"]}
    lists = {name: sizes[name] for name in ("mic_channels", "far_channels", "decoder_channels")}
    system = DeepVQE(
        **lists, gru_hidden=sizes["gru_hidden"], align=align, loss={"delay_weight": 0.02}, init_identity=False
    )
    if side != "ours":
        delays = system.network.alignment.max_delay_frames  # type: ignore[union-attr]
        naive = NaiveDeepVQE(**lists, num_bins=161, gru_hidden=sizes["gru_hidden"], max_delay_frames=delays)
        naive.load_state_dict(weights_of(system.network.state_dict(), naive))
        system.network = naive  # type: ignore[assignment]
    system.to(device).train()
    loss_of = lambda: system.step(batch)["loss"]  # noqa: E731
    return Job(training("deepvqe", system, loss_of), {"literal": first_loss(system, loss_of)})


def deepvqe_alignment(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    """The alignment alone, forward and backward, and its own weights' optimiser."""
    from benchmarks.naive_deepvqe import NaiveAlignment, weights_of
    from modules.alignment import SoftAlignment

    generator, channels = torch.Generator().manual_seed(0), sizes["channels"]
    shape = (sizes["batch"], channels, round(100 * sizes["seconds"]), 41)  # frames of 10 ms, 161 bins halved twice
    mic, far, wanted = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    mic, far = mic.requires_grad_(), far.requires_grad_()  # as what blocks of the network give
    torch.manual_seed(0)
    delays = round(sizes["max_delay_ms"] / 10)
    ours = SoftAlignment(mic_channels=channels, far_channels=channels, hidden_channels=32, max_delay_frames=delays)
    module: nn.Module = ours
    if side != "ours":
        module = NaiveAlignment(channels, channels, 32, delays)
        module.load_state_dict(weights_of(ours.state_dict(), module))
    module.to(device)
    loss_of = lambda: (module(mic, far)[0] - wanted).square().mean()  # noqa: E731
    return Job(training("deepvqe_alignment", module, loss_of), {"literal": first_loss(module, loss_of)})


BUILDERS = {
    "conv_tasnet": conv_tasnet,
    "nest": nest,
    "unet": unet,
    "deepvqe": deepvqe,
    "deepvqe_alignment": deepvqe_alignment,
}
