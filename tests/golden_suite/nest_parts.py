"""Single parts of NEST under several settings: the front end, the encoder."""

from pathlib import Path

import torch

from modules.conformer import ConformerEncoder
from modules.mel import MelPreprocessor
from tests.golden_suite.nest_model import ENCODER, FEATURES, FILTERS, read
from tests.golden_suite.reference import Reference, close
from tests.golden_suite.suite import Check, GoldenError, read_json


def tensors_of(variants: Path) -> Path:
    """The one safetensors file of a folder."""
    return next(iter(sorted(variants.parent.glob("*.safetensors"))), variants.with_suffix(".safetensors"))


def front_end(path: Path, check: Check) -> None:
    reference = read(tensors_of(path))
    for variant, settings in read_json(path).items():
        preprocessor = _make(path, variant, MelPreprocessor, settings)
        features, length = preprocessor(reference["in.wave"], reference["in.length"])
        close(check, f"{variant}.feat", features, reference[f"{variant}.feat"], tolerance=FEATURES)
        check.equal(f"{variant}.length", length.tolist(), reference[f"{variant}.length"].tolist())
        for name in ("fb", "window"):
            if f"{variant}.{name}" in reference:
                actual = getattr(preprocessor.featurizer, name)
                check.close(f"{variant}.{name}", actual, reference[f"{variant}.{name}"], tolerance=FILTERS)
    _finish(reference, check)


def encoder_variants(path: Path, check: Check) -> None:
    reference = read(tensors_of(path))
    for variant, settings in read_json(path).items():
        encoder = _make(path, variant, ConformerEncoder, settings)
        try:
            encoder.load_state_dict(reference.group(f"{variant}.sd."))
        except RuntimeError as error:
            raise GoldenError(f"{path}: {variant}: {error}") from error
        with torch.no_grad():
            outputs, lengths = encoder(reference["in.feat"], reference["in.length"])
        check.close(f"{variant}.outputs", outputs, reference[f"{variant}.outputs"], tolerance=ENCODER)
        check.equal(f"{variant}.lengths", lengths.tolist(), reference[f"{variant}.lengths"].tolist())
    _finish(reference, check)


def _make(path: Path, variant: str, part: type, settings: dict) -> torch.nn.Module:
    try:
        return part(**settings).eval()
    except (ValueError, TypeError) as error:
        raise GoldenError(f"{path}: {variant}: {error}") from error


def _finish(reference: Reference, check: Check) -> None:
    check.equal(f"{reference.path.name}: tensors that are neither inputs nor compared", reference.unused(), [])
