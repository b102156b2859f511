"""Golden cases of NEST, all from NeMo 3.0.0 unless said otherwise. A folder is known by what it holds or is called.

* `config.yaml` with `state_dict.safetensors`: a model, whatever the folder is called (nest_model.py).
* `frontend*`, `encoder_variants*`: single parts under the settings of `variants.json` (nest_parts.py).
* `units*`: `quantizer`, `loss`, `masking`, `augment`, each a JSON file of settings with tensors (nest_units.py).
* `sched*`, `stats*`, `nemo_archive*`: tables of learning rates, of masks and sizes, archives (nest_tables.py).

Each tensor of a file is an input or compared; one that is neither fails its case.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.golden_suite import nest_model, nest_parts, nest_tables, nest_units
from tests.golden_suite.suite import Case, Check

Run = Callable[[Path, Check], None]
# Beginning of a folder's name -> pattern of a file's name -> what to run on it.
FOLDERS: dict[str, dict[str, Run]] = {
    "frontend": {"variants.json": nest_parts.front_end},
    "encoder_variants": {"variants.json": nest_parts.encoder_variants},
    "units": {
        "quantizer.json": nest_units.quantizer,
        "loss.json": nest_units.loss,
        "masking.json": nest_units.masking,
        "augment.json": nest_units.augmentation,
    },
    "sched": {"*.csv": nest_tables.schedule},
    "stats": {
        "mask_stats_nemo3*.json": nest_tables.mask_statistics,
        "mask_stats_nemo2.5*.json": nest_tables.old_mask_statistics,
        "param_counts.json": nest_tables.parameter_counts,
        "state_dict_*.json": nest_tables.state_dict_names,
    },
    "nemo_archive": {"*.nemo": nest_tables.archive},
}
# What runs on a file -> the other file that it reads.
BESIDE: dict[Run, Callable[[Path], Path]] = {
    nest_parts.front_end: nest_parts.tensors_of,
    nest_parts.encoder_variants: nest_parts.tensors_of,
    nest_tables.archive: lambda path: path.with_name("expected.safetensors"),
    **dict.fromkeys(FOLDERS["units"].values(), lambda path: path.with_suffix(".safetensors")),
}


def discover(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / "config.yaml").is_file() and (path / "state_dict.safetensors").is_file():
            for name, (run, files) in nest_model.CASES.items():
                if (path / files[-1]).is_file():
                    claims = tuple(f"{path.name}/{file}" for file in files)
                    cases.append(Case(f"{path.name}-{name}", claims[-1], claims, partial(run, path)))
        for beginning, patterns in FOLDERS.items():
            if path.name.startswith(beginning):
                cases += [_case(file, run) for pattern, run in patterns.items() for file in sorted(path.glob(pattern))]
    return cases


def _case(file: Path, run: Run) -> Case:
    files = [file, *([BESIDE[run](file)] if run in BESIDE else [])]
    claims = tuple(f"{path.parent.name}/{path.name}" for path in files)
    return Case(f"{file.parent.name}-{file.stem}", claims[0], claims, partial(run, file))
