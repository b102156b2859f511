"""No recipe has a parameter without a gradient, for which DDP would wait and which would be trained for nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train

RECIPES = sorted(file.stem for file in (Path(train.__file__).parent / "config" / "experiment").glob("*.yaml"))
SYSTEMS = ("conv_tasnet", "deepvqe", "nest", "unet")
ALWAYS = ("deepvqe_demo", "unet_demo")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in (*SYSTEMS, *RECIPES)],
)
def test_each_parameter_learns(
    name: str, built: Callable[..., Any], tiny: dict[str, list[str]], corpus: Path, photos: Path, in_tmp: Path
) -> None:
    """The recipe at the sizes of a tiny system."""
    (in_tmp / "demo_data").symlink_to(corpus)
    (in_tmp / "demo_photos").symlink_to(photos)
    system = next(system for system in SYSTEMS if name.startswith(system))
    typed = [value for value in tiny[system] if not value.startswith(("model=", "model.stft="))]
    network, data, _ = built(f"experiment={name}" if name in RECIPES else f"model={name}", *typed, batch_size=2)
    data.setup("fit")
    network.train().step(next(iter(data.train_dataloader())))["loss"].backward()
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert weights
    assert not (unused := [name for name, weight in weights.items() if weight.grad is None]), unused
