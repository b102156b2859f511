"""A `.nemo` archive is a model: built from what it says of the architecture, with all of its weights, or refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models import load
from models.checkpoint import CheckpointError
from models.nemo import read_nemo, write_nemo
from models.nest import NEST
from modules.low_rank import restructure

BY_NEMO = Path(__file__).parents[1] / "golden" / "nest" / "nemo_archive" / "tiny.nemo"
ENCODER = {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 4}


def test_an_archive_of_nemo() -> None:
    expected = load_file(BY_NEMO.with_name("expected.safetensors"))
    system = load(BY_NEMO)
    assert isinstance(system, NEST) and not system.training
    with torch.inference_mode():
        encoded, length = system.encode(expected["in.wave"], expected["in.length"])
        log_probs = system.decoder(encoded)
    assert length.tolist() == expected["encoder.lengths"].tolist()
    torch.testing.assert_close(log_probs, expected["log_probs"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_an_archive_of_ours(position: str, tmp_path: Path) -> None:
    """Layers that were switched come back dense, so the last digits differ."""
    torch.manual_seed(0)
    system = NEST(num_classes=16, encoder=ENCODER, mask_position=position).eval()
    restructure(system, {"encoder.layers.0.feed_forward1.linear1": 3})
    system.save_to(tmp_path / "x.nemo")
    again = load(tmp_path / "x.nemo", cached=True)
    assert not again.structure and not again.training
    audio = torch.randn(2, 8000)
    with torch.inference_mode():
        torch.testing.assert_close(again(audio), system(audio), atol=1e-5, rtol=0)
    again.save_to(tmp_path / "y.nemo")
    first, second = (read_nemo(tmp_path / name) for name in ("x.nemo", "y.nemo"))
    assert first["model_config"] == second["model_config"]
    assert all(torch.equal(weight, second["state_dict"][name]) for name, weight in first["state_dict"].items())


def changed(key: str, value: Any) -> dict[str, Any]:
    """NeMo's configuration with another value; None takes the key out."""
    config = copy.deepcopy(read_nemo(BY_NEMO)["model_config"])
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    if value is None:
        del node[name]
    else:
        node[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("target", "nemo.collections.asr.models.EncDecCTCModel", "holds EncDecCTCModel, not NEST (EncDecDenoise"),
        ("quantizer", None, "holds EncDecDenoiseMaskedTokenPredModel, not NEST (no quantizer in it)"),
        ("encoder", 5, "model.encoder in the file is 5; a section is needed"),
        ("encoder._target_", "nemo.a.ConvASREncoder", "model.encoder in the file is of 'nemo.a.ConvASREncoder'; only "),
        ("encoder.d_model", "${model.x}", "model.encoder.d_model in the file is '${model.x}'; a plain value is needed"),
        ("sample_rate", {"a": 1}, "model.sample_rate in the file is {'a': 1}; a plain value is needed"),
        ("encoder.conv_dual_mode", True, "encoder.conv_dual_mode: no such key; encoder has feat_in, "),
        ("encoder.n_heads", 3, "encoder.d_model must be a multiple of n_heads, got 16 and 3"),
        ("encoder.n_layers", 2, "missing weights: encoder.layers.1.norm_feed_forward1.weight, "),
        ("encoder.use_bias", False, "unexpected weights: encoder.layers.0.feed_forward1.linear1.bias, "),
        ("encoder.ff_expansion_factor", 2, "mismatched weights: encoder.layers.0.feed_forward1.linear1.weight, "),
    ],
)
def test_what_is_no_nest_is_one_line(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.nemo"
    write_nemo(file, changed(key, value), read_nemo(BY_NEMO)["state_dict"])
    with pytest.raises(CheckpointError) as raised:
        load(file)
    assert str(raised.value).startswith(f"{file}: {reason}") and "\n" not in str(raised.value)


def test_the_rest_of_the_file_is_ignored(tmp_path: Path) -> None:
    content = read_nemo(BY_NEMO)
    more = {"train_ds": {"manifest_filepath": "${x}"}, "optim": {"name": "nonsense"}, "nemo_version": 7, "cfg": [1]}
    write_nemo(tmp_path / "x.nemo", content["model_config"] | more, content["state_dict"])
    assert load(tmp_path / "x.nemo").optim == {}
