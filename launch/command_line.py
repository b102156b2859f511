"""The command line before Hydra sees it, and what to say when Hydra refuses it.

* Flags move to the front: argparse refuses overrides on both sides of one.
* `checkpoint=` is `ckpt_path=`; a value with a `=` in it is quoted.
* For evaluate, predict and export the checkpoint's own configuration becomes the base that overrides are typed on.
* When no system is chosen but a typed key exists in exactly one, that system is taken.
* A configuration that was written for NeMo is recognised, see launch/foreign.py.
* A mistyped key is answered with the nearest keys, all of them in one message.
"""

import difflib
import functools
import string
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch import foreign
from launch.composing import damaged_file, unreadable, words
from launch.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "config"
# OmegaConf's words around what a resolver of ours, such as the run directory's, has to say.
_OF_A_RESOLVER = "ConfigError raised while resolving interpolation: "
_SECTIONS_NULL = {f"{group}=null" for group in ("model", "data", "trainer", "exp_manager", "callbacks", "logger")}
# The name under which evaluate.yaml, predict.yaml and export.yaml include the checkpoint's configuration.
RUN_CONFIGURATION = "run_configuration"
# The primary configuration of systems that have one of their own.
_PRIMARY = {"nest": "nest_fast-conformer"}
# Choices that a package brings along, and the extra of pyproject.toml that installs it.
_EXTRAS = {
    "hydra/sweeper=optuna": "optuna",
    "hydra/launcher=submitit_slurm": "submitit",
    "hydra/launcher=submitit_local": "submitit",
}
# Characters of a value that Hydra reads without quotes.
_UNQUOTED = set(f"{string.ascii_letters}{string.digits}/-_.:+*?%@|\\ ")
# Prefix of the name under which a foreign primary configuration, laid over train.yaml, is stored.
_OVER_TRAIN = "over_train_"


def prepare(argv: list[str], script: str) -> list[str]:
    """The arguments that Hydra gets for those that were typed. *script*: `train`, `evaluate`, `predict`, `export`.

    Applying it twice changes nothing, since distributed children start from the result.
    """
    parser = get_args_parser()
    typed = parser.parse_intermixed_args(argv)
    if typed.experimental_rerun:
        raise ConfigError("--experimental-rerun loads a pickle and is refused; command.sh of the run repeats it")
    overrides = [_quoted(f"ckpt_path={o[11:]}" if o.startswith("checkpoint=") else o) for o in typed.overrides]
    flags = _without(argv, typed.overrides)
    for override in overrides:
        if override.lstrip("+") in _SECTIONS_NULL:
            raise ConfigError(f"{override}: the section cannot be left out")
    if typed.help and not _chooses_system(typed, overrides) and script == "train":
        print(_overview())
        raise SystemExit(0)
    if script == "train":
        flags, overrides = _own_sections_for_foreign(flags, overrides, typed)
        flags, overrides = _infer_system(typed, flags, _anchored(typed, overrides))
    else:
        overrides = _with_run_configuration(overrides, script)
    return [*flags, *overrides]


def _quoted(override: str) -> str:
    """An override in the quotes that Hydra wants around a `=`, as in names of checkpoints, and letters such as ö.

    What might have another meaning (lists, sweeps, quotes) stays as it is typed.
    """
    key, _, value = override.partition("=")
    if set(value) & set("'\"[]{}()$,") or not set(value) - _UNQUOTED:
        return override
    return f"{key}='{value}'"


def _without(argv: list[str], overrides: list[str]) -> list[str]:
    rest, remaining = [], list(overrides)
    for token in argv:
        if token in remaining:
            remaining.remove(token)
        else:
            rest.append(token)
    return rest


def _anchored(typed: Any, overrides: list[str]) -> list[str]:
    """Overrides in which a sweep over systems or experiments is preceded by a plain choice of its first.

    Hydra composes what all jobs share without the swept choices; there would be no system in it, and no key of one
    could be typed. In each job the choice that comes later wins.
    """
    swept = [o for o in overrides if o.startswith(("experiment=", "model="))]
    if not typed.multirun or not swept:
        return overrides
    try:
        parsed = OverridesParser.create().parse_overrides(swept)
    except HydraException:
        return overrides  # Hydra finds it too, and `explain` says so
    with _composer(typed.config_dir, typed.config_path) as (loader, _):
        first = [_of_first_job(override, loader) for override in parsed if override.is_sweep_override()]
    return [*(choice for choice in first if choice not in overrides), *overrides]


def _own_sections_for_foreign(flags: list[str], overrides: list[str], typed: Any) -> tuple[list[str], list[str]]:
    """Let a primary configuration of another folder use our groups and get its missing sections from train.yaml.

    What it says counts as typed: it is merged over train.yaml, and only the command line comes after it.
    """
    if typed.config_path is None or (folder := _primary_folder(typed.config_path)) == CONFIG_DIR:
        return flags, overrides
    if not any(o.startswith("hydra.searchpath=") for o in overrides):
        overrides = [*overrides, f"hydra.searchpath=[file://{CONFIG_DIR}]"]
    name = str(typed.config_name or "train").removesuffix(".yaml").removeprefix(_OVER_TRAIN)
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"--config-path={typed.config_path} --config-name={name}: {file} is not there")
    content = foreign.read(file)
    if "hydra" in content:
        raise ConfigError(f"{file}: take out its section hydra; exp_manager says where a run lives")
    if foreign.written_for_nemo(content):
        groups = _names(overrides)
        if added := [choice for choice in foreign.CHOICES if choice.partition("=")[0] not in groups]:
            print(f"{file} is written for NeMo: taken with {' '.join(added)}", file=sys.stderr)
        overrides = [*added, *overrides]
    ConfigStore.instance().store(name=_OVER_TRAIN + name, node={"defaults": ["train", name, "_self_"]}, package=None)
    replaced = {f"--config-name={typed.config_name}", typed.config_name}
    return [_replace_name(flag, replaced, _OVER_TRAIN + name) for flag in flags], overrides


def _primary_folder(config_path: str) -> Path:
    """Hydra's rule: `--config-path` is relative to the script."""
    return (CONFIG_DIR.parent / config_path).resolve()


def _replace_name(flag: str, replaced: set[str | None], name: str) -> str:
    if flag not in replaced:
        return flag
    return f"--config-name={name}" if flag.startswith("--") else name


# Systems


def systems(extra_dir: str | None = None) -> list[str]:
    """The names that `model=` takes."""
    folders = [CONFIG_DIR, *([Path(extra_dir)] if extra_dir else [])]
    return sorted({file.stem for folder in folders for file in (folder / "model").glob("*.yaml")})


def _chooses_system(typed: Any, overrides: list[str]) -> bool:
    return bool(typed.config_name or _names(overrides) & {"model", "experiment"})


def _names(overrides: list[str]) -> set[str]:
    """The keys and groups of overrides."""
    return {override.partition("=")[0].lstrip("+~") for override in overrides}


def _overview() -> str:
    return f"""Train a system on your data.

  python train.py model=<system> data.train_manifest=<manifest> [key=value …]
  python train.py experiment=<recipe> [key=value …]

systems   {", ".join(systems())}
recipes   {_experiments().replace("|", ", ")}

python train.py model=<system> --help       every key with its default
python train.py … dry_run=true              build everything, print sizes, stop
python train.py … debug=fast                a few steps of everything
python train.py … exp_manager.resume_if_exists=true        continue the newest run of that name
python train.py -m … model.optim.lr=1e-3,3e-4              a sweep

evaluate.py, predict.py and export.py take ckpt_path=<checkpoint or run directory>."""


def _infer_system(typed: Any, flags: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Choose a system when the typed keys belong to one only: `model=<name>`, or its primary configuration."""
    if _chooses_system(typed, overrides) or typed.hydra_help or typed.info:
        return flags, overrides
    names = _names(overrides)
    candidates = systems(typed.config_dir)
    having = {
        system: {name for name in names if "." in name} & _keys_of(system, typed.config_dir) for system in candidates
    }
    owners = [
        system
        for system, own in having.items()  # all that others have of the typed keys, and more
        if all(own > other for name, other in having.items() if name != system)
    ]
    if len(owners) != 1:
        _refuse_keys_of_none(overrides, set().union(*(_keys_of(system, typed.config_dir) for system in candidates)))
        raise ConfigError(f"choose a system: model={'|'.join(candidates)} (or a recipe: experiment={_experiments()})")
    primary = _PRIMARY.get(owners[0])
    choice = f"--config-name={primary}" if primary else f"model={owners[0]}"
    print(f"{choice}: the typed keys belong to this system", file=sys.stderr)
    return ([choice, *flags], overrides) if primary else (flags, [choice, *overrides])


def _refuse_keys_of_none(overrides: list[str], have: set[str]) -> None:
    """Raises ConfigError for the first typed key that no system has and that comes near one that some have."""
    for override in overrides:
        key = override.partition("=")[0]
        ours = key[:1].isalpha() and "." in key and not key.startswith("hydra.")
        if ours and key not in have and (near := _nearest(key, have)):
            raise ConfigError(f"{override}: no system has such a key. Did you mean {', '.join(near)}?")


def _experiments() -> str:
    return "|".join(sorted(file.stem for file in (CONFIG_DIR / "experiment").glob("*.yaml")))


# The checkpoint's configuration as base


def _with_run_configuration(overrides: list[str], script: str) -> list[str]:
    """Put the configuration that the checkpoint holds where Hydra finds it; `ckpt_path` then names the very file."""
    path = next((o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("ckpt_path=")), None)
    node: dict[str, Any] = {}
    if path and path != "???":
        from launch.checkpoint import locate, run_configuration  # imports torch, which only a named checkpoint needs

        packages = [o for o in overrides if o.startswith("packages=")]
        typed = OverridesParser.create().parse_overrides(packages[-1:])
        file = locate(path)
        node = run_configuration(file, script, list(typed[0].value()) if typed else [])  # type: ignore[arg-type]
        quoted = str(file).replace("'", "\\'")
        overrides = [f"ckpt_path='{quoted}'" if o.startswith("ckpt_path=") else o for o in overrides]
    ConfigStore.instance().store(name=RUN_CONFIGURATION, node=node, package="_global_")
    return overrides


# What to say when Hydra refuses


def explain(error: Exception, argv: list[str], script: str) -> str:
    """One message with everything that is wrong with the overrides; Hydra's own words where we know no better."""
    if own := str(error).partition(_OF_A_RESOLVER)[2]:
        return own.splitlines()[0]
    typed = get_args_parser().parse_intermixed_args(argv)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        folders = [Path(typed.config_dir)] if typed.config_dir else []
        folders += [_primary_folder(typed.config_path)] if typed.config_path else []
        chosen = [o for o in typed.overrides if "." not in o.partition("=")[0]]  # groups, and keys at the top
        return f"{damaged_file(error, folders)} ({' '.join(chosen)})"
    try:
        overrides = OverridesParser.create().parse_overrides(typed.overrides)
    except HydraException:
        return "\n".join(line for override in typed.overrides for line in unreadable(override))
    primary = typed.config_name or script
    try:
        problems = _problems(primary, overrides, typed.config_dir, typed.config_path)
    except HydraException as problem:
        problems = [words(problem)]
    return "\n".join(problems) or words(error)


def _problems(primary: str, overrides: list[Override], extra_dir: str | None, config_path: str | None) -> list[str]:
    with _composer(extra_dir, config_path) as (loader, compose):
        groups = {g for g in loader.list_groups("") if g != "hydra"}
        choices = [o for o in overrides if o.key_or_group in groups or "/" in o.key_or_group]
        problems = [line for choice in choices for line in _wrong_choice(loader, choice)]
        if problems:
            return problems
        config = compose(primary, [_of_first_job(choice, loader) for choice in choices])
        have = set(keys(config))
        for override in overrides:
            if override in choices or override.is_add() or override.is_force_add():
                continue
            problems += [_no_such_key(key, override, have, groups, loader) for key in _unknown(override, have)]
    return problems


def _of_first_job(choice: Override, loader: ConfigLoader) -> str:
    """The choice as it is typed, of a sweep the first. Raises ConfigError for a glob that nothing matches."""
    if not choice.is_sweep_override():
        return str(choice.input_line)
    value, options = choice.value(), loader.get_group_options(choice.key_or_group)
    names = value.filter(options) if isinstance(value, Glob) else list(choice.sweep_string_iterator())
    if not names:
        raise ConfigError(f"{choice.input_line}: matches nothing; choose from {', '.join(sorted(options))}")
    return f"{choice.get_key_element()}={names[0]}"


def _wrong_choice(loader: ConfigLoader, choice: Override) -> Iterator[str]:
    value = choice.value()
    options = loader.get_group_options(choice.key_or_group)
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and name not in options and name != "null":
            if extra := _EXTRAS.get(f"{choice.key_or_group}={name}"):
                yield f"{choice.input_line}: not installed here: pip install {' '.join(_packages(extra))}"
                continue
            near = difflib.get_close_matches(name, options, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"{choice.input_line}: no such {choice.key_or_group}.{hint} Choose from {', '.join(sorted(options))}"


def _packages(extra: str) -> list[str]:
    project = tomllib.loads((CONFIG_DIR.parent / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra]


def _unknown(override: Override, have: set[str]) -> list[str]:
    key = override.key_or_group
    if key.startswith("hydra."):
        return []
    value = override.value()
    if key in have and isinstance(value, dict):  # a mapping typed whole may hold a new key inside
        inner = [f"{key}.{name}" for name in value]
        return [name for name in inner if name not in have and any(k.startswith(key + ".") for k in have)]
    return [] if key in have else [key]


def _no_such_key(key: str, override: Override, have: set[str], groups: set[str], loader: ConfigLoader) -> str:
    group, _, rest = key.partition(".")
    option = rest.partition(".")[0]
    if group == "callbacks" and option in loader.get_group_options(group) and f"{group}.{option}" not in have:
        return f"{override.input_line}: {group}.{option} is not chosen here; add callbacks=[default,{option}]"
    near = _nearest(key, have | groups)
    hint = f"Did you mean {', '.join(near)}?" if near else f"(a new key is added with +{override.input_line})"
    inner = f" {key}" if key != override.key_or_group else ""
    return f"{override.input_line}: no such key{inner}. {hint}"


def _nearest(key: str, have: set[str]) -> list[str]:
    """Keys one slip away; else those with the same last part; else whatever is alike."""
    alike = difflib.get_close_matches(key, have, 3, 0.6)
    scores = [difflib.SequenceMatcher(None, key, other).ratio() for other in alike]
    if scores and scores[0] > 0.75:
        return [other for other, score in zip(alike, scores, strict=True) if score > scores[0] - 0.05]
    same_name = sorted(other for other in have if other.rpartition(".")[2] == key.rpartition(".")[2])
    return same_name[:3] or alike


def keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, without resolving anything."""
    for name in config:
        path = f"{prefix}{name}"
        yield path
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            yield from keys(node, path + ".")


def near_misses(added: list[str], config: DictConfig) -> list[str]:
    """Keys added with `+` that lie one slip from an existing one: most likely a typing error."""
    have = list(keys(config))
    lines = []
    for key in added:
        near = [k for k in difflib.get_close_matches(key, have, 3, 0.9) if k != key]
        if near:
            lines.append(f"+{key} adds a new key; did you mean {near[0]}?")
    return lines


@functools.cache  # the folders stay as they are while a process runs
def _keys_of(system: str, extra_dir: str | None) -> set[str]:
    with _composer(extra_dir, None) as (_, compose):
        return set(keys(compose("train", [f"model={system}"])))


class _composer:
    """Hydra's compose over our folder and those that were named, beside a Hydra that may already be active."""

    def __init__(self, extra_dir: str | None, config_path: str | None) -> None:
        self.extra = Path(extra_dir).resolve() if extra_dir else None
        self.primary = _primary_folder(config_path) if config_path else None

    def __enter__(self) -> tuple[ConfigLoader, Any]:
        from hydra import compose, initialize_config_dir
        from hydra.core.config_search_path import SearchPathQuery
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        self.context = initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        self.context.__enter__()
        loader = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        # As Hydra orders them: the primary's folder wins, also over a file of ours with its name.
        for folder, before in ((self.extra, "schema"), (self.primary, "main")):
            if folder is not None:
                path.prepend("typed", f"file://{folder}", SearchPathQuery(provider=before))
        loader.repository.initialize_sources(path)  # type: ignore[attr-defined]  # so that groups are listed too
        return loader, compose

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
