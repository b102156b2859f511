from typing import Any

import pytest
import torch
from torch import Tensor

from models.global_loss import CountedGradient
from models.nemo import read_nemo
from models.nest import ARCHITECTURE, NEST
from tests.modules.device_waits import NoValueIsAsked

ENCODER = {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 4, "ff_expansion_factor": 2}
STILL = {"dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_att": 0.0}


def build(seed: int = 0, *, encoder: dict[str, Any] | None = None, **arguments: Any) -> NEST:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"num_classes": 16, "num_books": 2, "masking": {"mask_prob": 0.05}}
    return NEST(**(defaults | arguments), encoder=ENCODER | (encoder or {}))


def make_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths)
    inside = torch.arange(max(lengths)) < length[:, None]
    audio = torch.randn(len(lengths), max(lengths), generator=generator) * 0.1 * inside
    noisy = audio + 0.03 * torch.randn(audio.shape, generator=generator) * inside
    seeds = torch.arange(len(lengths)) + 1000 * seed
    return {"audio": audio, "length": length, "noisy": noisy, "noisy_length": length, "mask_seed": seeds}


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_of_training(position: str, precision: torch.dtype) -> None:
    system = build(mask_position=position, masking={"mask_prob": 0.2})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        output = system.step(make_batch([24000, 16000]))
    output["loss"].backward()
    assert 1.0 < output["loss"].item() < 5.0, "about ln(16)"
    assert int(output["loss_count"]) > 0
    gradients = {name: p.grad for name, p in system.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    below = [name for name in gradients if "pre_encode" in name]
    assert bool(below) == (position == "pre_conv"), "after the sub-sampling, its weights are left as they are"


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_nothing_in_a_step_waits_for_the_device(position: str) -> None:
    system, batch = build(mask_position=position), make_batch([24000, 16000])
    metric = system.make_metric("val")
    with NoValueIsAsked():
        output = system.step(batch)
        gradient = CountedGradient()
        gradient.weigh(output["loss"], output["loss_count"]).backward()
        gradient.divide(system.parameters(), scale=2.0, distributed=False)
        system.update_metric(metric, batch, system.eval().step(batch))


def test_weights_that_never_learn_are_left_out_of_ddp_and_no_others() -> None:
    system = build(mask_position="post_conv", masking={"mask_prob": 0.3, "freeze": False})
    system.step(make_batch([24000]))["loss"].backward()
    named = dict(system.named_parameters(remove_duplicate=False))
    left_out = {id(named[name]) for name in system._ddp_params_and_buffers_to_ignore}
    learning = {id(p) for p in system.parameters() if p.requires_grad and id(p) not in left_out}
    assert learning == {id(p) for p in system.parameters() if p.grad is not None}
    assert id(system.mask_processor.mask_embedding) in learning


def test_a_causal_subsampling_has_a_frame_more_than_there_are_tokens() -> None:
    system = build(encoder={"causal_downsampling": True, "conv_context_size": "causal", "att_context_size": [-1, 0]})
    output = system.eval().step(make_batch([24000]))
    assert output["log_probs"].shape[1] == output["tokens"].shape[1] == output["valid"].shape[1]
    assert 1.0 < output["loss"].item() < 5.0


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_a_batch_without_a_masked_frame_costs_nothing_and_is_counted(position: str) -> None:
    system = build(mask_position=position, masking={"mask_prob": 0.0})
    for count in (1, 2):
        output = system.step(make_batch([16000]))
        output["loss"].backward()
        assert float(output["loss"]) == 0 and int(output["empty_batches"]) == count
    assert all(p.grad is None or not p.grad.any() for p in system.parameters())
    saved: dict[str, Any] = {}
    system.on_save_checkpoint(saved)
    again = build(mask_position=position)
    again.on_load_checkpoint(saved)
    assert int(again._num_empty_batches) == 2


def test_nemo_compat_has_the_loss_of_nothing_as_nemo_has_it() -> None:
    system = build(masking={"mask_prob": 0.0}, nemo_compat=True)
    output = system.step(make_batch([16000]))
    output["loss"].backward()
    assert output["loss"].isnan()
    assert system.loss_reduce == "local"


def test_masks_and_loss_of_validation_repeat_and_do_not_depend_on_the_batch() -> None:
    system = build().eval()
    batch = make_batch([24000, 16000, 32000])
    with torch.no_grad():
        first, second = system.step(batch), system.step(batch)
        singles = [
            system.step(
                {
                    key: value[i : i + 1, : int(batch["length"][i])] if value.ndim > 1 else value[i : i + 1]
                    for key, value in batch.items()
                }
            )
            for i in range(3)
        ]
    assert torch.equal(first["loss"], second["loss"])
    assert sum(int(s["loss_count"]) for s in singles) == int(first["loss_count"]) > 0
    total = sum(float(s["nll"]) for s in singles)
    assert total / int(first["loss_count"]) == pytest.approx(float(first["loss"]), rel=1e-5)
    compat = build(nemo_compat=True).eval()
    with torch.no_grad():
        assert not torch.equal(compat.step(batch)["loss"], compat.step(batch)["loss"])


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_what_the_encoder_says_of_a_recording_does_not_depend_on_its_batch(norm: str) -> None:
    system = build(encoder={"conv_norm_type": norm}).eval()
    batch = make_batch([24000, 15000, 19000])
    with torch.no_grad():
        together, frames = system.encode(batch["audio"], batch["length"])
        for i, length in enumerate(batch["length"]):
            alone, own_frames = system.encode(batch["audio"][i : i + 1, : int(length)], length[None])
            assert int(own_frames) == int(frames[i])
            valid = int(own_frames)
            torch.testing.assert_close(alone[0, :, :valid], together[i, :, :valid], atol=1e-5, rtol=0)


def test_after_the_subsampling_all_sections_count_its_frames() -> None:
    system = build(mask_position="post_conv", masking={"block_size": 40})
    assert system.mask_processor.block_size == 5
    assert system.loss["combine_time_steps"] == 1
    assert system.quantizer.proj.weight.shape[1] == 16
    # NeMo saves the sections as it has rewritten them; block sizes are not divided again.
    rewritten = {"masking": {"block_size": 5, "feat_in": 16}, "quantizer": {"feat_in": 16, "combine_time_steps": 1}}
    saved = build(mask_position="post_conv", loss={"combine_time_steps": 1}, **rewritten)
    assert saved.mask_processor.block_size == 5
    assert list(saved.state_dict()) == list(system.state_dict())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask_position": "mid"}, "mask_position must be pre_conv or post_conv"),
        ({"encoder": {"num_layers": 2}}, r"encoder\.num_layers: no such key; encoder has .*n_layers"),
        ({"encoder": {"subsampling": "vggnet"}}, r"encoder\.subsampling"),
        ({"encoder": {"n_heads": 3}}, r"encoder\."),
        ({"masking": {"blocksize": 3}}, r"masking\.blocksize: no such key"),
        ({"quantizer": {"num_books": 3}}, r"quantizer\.num_books=3 does not fit the other sections: it is 2"),
        ({"decoder": {"feat_in": 3}}, r"decoder\.feat_in=3 does not fit"),
        ({"loss": {"reduce": "sum"}}, r"loss\.reduce must be global or local"),
        ({"loss": {"combine_time_steps": 4}}, r"loss\.combine_time_steps=4 does not fit"),
        ({"quantizer": {"combine_time_steps": 4}}, r"quantizer\.combine_time_steps=4 does not fit"),
        ({"quantizer": {"squeeze_single": True}}, r"quantizer\.squeeze_single=True does not fit"),
        ({"quantizer": {"time_ahead": True}}, r"quantizer\.time_ahead must be false"),
        ({"masking": {"feat_in": 40}}, r"masking\.feat_in=40 does not fit the other sections: it is 80"),
        ({"loss": {"mask_threshold": 1.5}}, r"loss\.mask_threshold must be a number from 0 to below 1"),
        ({"preprocessor": {"pad_to": 12}}, r"preprocessor\.pad_to must be a multiple of"),
        ({"encoder": {"feat_out": "x"}}, r"encoder\.feat_out must be a whole number"),
        ({"spec_augment": {"nonsense": 3}}, r"spec_augment\.nonsense: no such key"),
        ({"encoder": {"xscaling": "foo"}}, r"encoder\.xscaling must be true or false"),
        ({"encoder": {"conv_kernel_size": "abc"}}, r"encoder\.conv_kernel_size must be a whole number"),
        ({"nemo_compat": "foo"}, "nemo_compat must be true or false"),
        ({"spec_augment": 3}, r"spec_augment must be a section"),
        ({"preprocessor": {"sample_rate": 8000}}, r"preprocessor\.sample_rate=8000 does not fit"),
    ],
)
def test_sections_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(**arguments)


def test_masking_after_the_subsampling_needs_no_padding() -> None:
    system = build(mask_position="post_conv", preprocessor={"pad_to": 0}, masking={"mask_prob": 0.3})
    assert int(system.step(make_batch([24010]))["loss_count"]) > 0


def test_what_nemo_has_beside_is_taken_when_it_asks_for_nothing() -> None:
    build(encoder={"reduction": None, "reduction_factor": 1}, preprocessor={"_target_": "x.Y", "stft_conv": None})
    with pytest.raises(ValueError, match=r"encoder\.reduction: no such key"):
        build(encoder={"reduction": "striding"})


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_an_archive_holds_the_network(position: str, tmp_path: Any) -> None:
    system = build(mask_position=position).eval()
    system.save_to(tmp_path / "x.nemo")
    content = read_nemo(tmp_path / "x.nemo")
    arguments = {key: value for key, value in content["model_config"].items() if key in ARCHITECTURE}
    again = NEST(**arguments).eval()
    again.load_state_dict(content["state_dict"])
    audio = make_batch([16000])["audio"]
    with torch.no_grad():
        assert torch.equal(system(audio), again(audio))
    config = content["model_config"]
    assert all("_target_" in config[name] for name in ("encoder", "masking", "loss"))
    # NeMo's classes have other defaults, so all keys are there; it divides the block by itself.
    assert config["masking"]["block_size"] == 40 and config["decoder"]["use_bias"] is True
    assert config["quantizer"]["combine_time_steps"] == (8 if position == "pre_conv" else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("bucketing", [False, True])
def test_batches_arrive_in_pinned_memory(built: Any, tiny: dict[str, list[str]], bucketing: bool) -> None:
    """All tensors of one, so that none is copied to the device while the step waits."""
    typed = [*tiny["nest"], "model.train_ds.pin_memory=true", f"model.train_ds.use_bucketing={str(bucketing).lower()}"]
    data = built(*typed).data
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))
