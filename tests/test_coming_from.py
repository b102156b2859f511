"""docs/coming_from.md, held against the configuration: keys, defaults and choices, and no old key is missing."""

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from models.unet import UNet
from tests.pages import ROOT

CONFIG = ROOT / "config"
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
NOTHING, SAME = "–", "the same"
# What the guides' configurations hold, by the heading under which it has to be.
OLD = {
    "The Conv-TasNet guide's config.yml": """
        model.encoder.num_filters model.encoder.kernel_size model.encoder.stride separation.hidden_channels
        separation.num_blocks separation.num_repeats training.batch_size training.accumulation_steps
        training.learning_rate training.use_amp training.scheduler.type training.scheduler.mode
        training.scheduler.patience training.scheduler.factor training.scheduler.min_lr training.gradient_clip
        training.early_stopping_patience dataset.audio_length dataset.segment_length""",
    "The AEC guide's arguments": """
        --batch_size --num_workers pin_memory persistent_workers accumulate_grad_batches use_val every_5_epochs""",
    "The UNet guide's YACS file": """
        TRAIN.BATCH_SIZE TRAIN.GRADIENT_ACCUMULATION_STEPS TRAIN.MIXED_PRECISION TRAIN.GRADIENT_CLIP DATA.NUM_WORKERS
        DATA.PREFETCH_FACTOR DATA.PIN_MEMORY DATA.PERSISTENT_WORKERS DATA.CACHE_IMAGES OPTIMIZER.NAME OPTIMIZER.LR
        OPTIMIZER.WEIGHT_DECAY OPTIMIZER.BETAS OPTIMIZER.EPS PREDICT.BATCH_SIZE PREDICT.AUTO_BATCH_SIZE
        PREDICT.MAX_BATCH_SIZE PREDICT.MIN_BATCH_SIZE PREDICT.MEMORY_THRESHOLD PREDICT.USE_MIXED_PRECISION
        PREDICT.NON_BLOCKING""",
    "The low-rank and DBC guide": """
        conservative balanced aggressive scheme_1 scheme_2 scheme_3 scheme_4 checkpointing finder scale_lr_with_batch
        preloaded""",
    "NeMo": "init_from_nemo_model init_from_ptl_ckpt init_from_pretrained_model",
    "Other frameworks": "asteroid SpeechBrain segmentation_models_pytorch lightning-hydra-template",
}


class Row(NamedTuple):
    heading: str
    command: list[str]  # after which it is typed
    there: str
    here: str
    default: str
    note: str


def rows() -> Iterator[Row]:
    """Of the tables with four columns."""
    heading, command = "", []
    for line in PAGE.splitlines():
        if line.startswith("## "):
            heading, command = line[3:], []
        elif typed := re.search(r"[Tt]yped after `python ([^`]*)`", line):
            command = typed[1].split()
        elif line.startswith("|") and not line.startswith(("| there |", "|---")):
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            if len(cells) == 4:
                yield Row(heading, command, *cells)


ROWS = list(rows())


@functools.cache
def composed(*typed: str) -> DictConfig:
    """What follows train.py; a choice of a primary configuration first."""
    name = "train"
    if typed[0].startswith("--config-name="):
        name, *typed = (typed[0].partition("=")[2], *typed[1:])
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
        return compose(name, list(typed))


def options(*systems: type) -> dict[str, Any]:
    """Of predict.py, with their defaults."""
    return {name: p.default for cls in systems for name, p in inspect.signature(cls.predict).parameters.items()}


def overrides(text: str) -> Iterator[tuple[str, Any]]:
    """Key and value of each override in a text's code; what stands there for something else is left out."""
    for code in re.findall(r"`([^`]*)`", text):
        for word in code.split():
            if re.fullmatch(r"[\w.]+=[^<…]+", word):
                yield word.partition("=")[0], OverridesParser.create().parse_override(word).value()


def is_choice(key: str, value: Any) -> bool:
    """Whether *key* is a folder of config/, whose files are chosen by *value*."""
    values = value if isinstance(value, list) else [value]
    return (CONFIG / key).is_dir() and all((CONFIG / key / f"{name}.yaml").is_file() for name in values)


def default_of(row: Row, key: str, value: Any) -> Any:
    """Raises AssertionError where there is no such key."""
    if row.command[0] == "predict.py":
        assert key in options(UNet), f"predict.py has no {key}"
        return options(UNet)[key]
    if (CONFIG / key).is_dir():
        assert is_choice(key, value), f"config/{key} has no {value}"
        return None
    return default_in(composed(*row.command[1:]), key)


def default_in(config: DictConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else config
    assert isinstance(node, DictConfig) and name in node, f"no such key: {key}"
    value = None if OmegaConf.is_missing(node, name) else node[name]
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.there[:40])
def test_row(row: Row) -> None:
    if row.here == NOTHING:
        assert row.default == NOTHING and row.note, "without a counterpart it has to say what to do"
        return
    typed = list(overrides(row.here))
    assert typed and row.command
    defaults = [default_of(row, key, value) for key, value in typed]
    values = [value for _, value in typed]
    if row.default == SAME:
        assert defaults == values
    elif row.default == NOTHING:
        assert len(typed) > 1 and defaults != values, "a single default can be told"
    else:
        assert defaults == [OverridesParser.create().parse_override(f"x={row.default.strip('`')}").value()]
        assert defaults != values, "it is the same"


def keys(config: DictConfig | ListConfig) -> set[str]:
    """All keys of a configuration, those of sections too."""
    found: set[str] = set()

    def visit(node: Any, prefix: str) -> None:
        for name in node if isinstance(node, dict) else ():
            found.add(f"{prefix}{name}")
            visit(node[name], f"{prefix}{name}.")

    visit(OmegaConf.to_container(config), "")
    return found


def test_all_that_is_mentioned_is_there() -> None:
    """In notes and prose, too: a key of a system or a script, an option of predict.py, or a choice."""
    systems = ("conv_tasnet", "deepvqe", "nest", "unet")
    configs: list[Any] = [composed(f"model={name}", "callbacks=[default,low_rank,dbc]") for name in systems]
    configs += [OmegaConf.load(CONFIG / f"{name}.yaml") for name in ("predict", "evaluate", "export")]
    known = {*options(ConvTasNet, DeepVQE, UNet)}.union(*map(keys, configs))
    ours = [line if line[:1] != "|" else line[1:].partition("|")[2] for line in PAGE.splitlines()]
    mentioned = list(overrides("\n".join(ours)))
    assert len(mentioned) > 100
    choices = [(key, value) for key, value in mentioned if (CONFIG / key).is_dir()]
    assert [choice for choice in choices if not is_choice(*choice)] == []
    assert [key for key, _ in mentioned if key not in known and not (CONFIG / key).is_dir()] == []


@pytest.mark.parametrize("heading", OLD)
def test_no_old_key_is_missing(heading: str) -> None:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    there = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    words = [key.replace("_", " ") if key.startswith(("every", "scheme")) else key for key in OLD[heading].split()]
    assert [word for word in words if not re.search(rf"(?<![\w.]){re.escape(word)}\b", there)] == []
