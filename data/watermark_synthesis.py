"""Training examples from photos: marks are drawn over a photo, and where they are is known exactly.

    photo -> signs of the scene -> marks, one over another -> JPEG, resizing, blur, noise, colour = image
                                     their coverage        ->                                       mask

Decisions that are not obvious
* The mask is made from coverage, never from alpha (data/blending.py): a mark has the same mask at any opacity.
* A mark that cannot be seen where it fell (white on snow) is drawn again with another shape, place and colour but with
  its opacity: the share of faint marks stays what the settings say.
* Each part draws from a random stream of its own: other distortions, or no signs, leave the marks as they are.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.blending import MASK_RULES, MODES, change_of, composite, mask_of, to_uint8, visible_share
from data.checks import number, whole_number
from data.distortions import Distortions
from data.fonts import FontBook
from data.mark_styles import COLOURS, STYLES
from data.mark_texts import SCRIPTS
from data.marks import LAYOUTS, Mark, Shares, draw_mark
from data.ranges import Range, check_range
from data.scene_text import draw_scene_text

_TRIES = 8  # drawings of a mark until it can be seen


class Example(NamedTuple):
    """`image` uint8 `(H, W, 3)`, `mask` uint8 `(H, W)` of 0 and 1, and what was drawn, for JSON."""

    image: np.ndarray
    mask: np.ndarray
    record: dict[str, Any]


class WatermarkSynthesis:
    """Draws marks on photos.

    The same photo and a freshly seeded `rng` give the same example. Ranges are [low, high]. Scripts, layouts, styles
    and colours are a list of names, each as likely as the others, or a share for each name.

    Args:
        fonts: "auto", or a list of font files, folders and packages (data/fonts.py).
        scripts: that marks and signs are written in, of `data.mark_texts.SCRIPTS`.
        layouts: how marks stand on the photo, of `data.marks.LAYOUTS`.
        styles: how their letters are painted, of `data.mark_styles.STYLES`.
        colours: of their letters, of `data.mark_styles.COLOURS`.
        size: of the font, relative to the shorter side of the photo.
        angle: degrees, counter-clockwise.
        clean_p: share of the photos without marks.
        several_p: share of the others with more than one mark,
        num_marks: two up to this many.
        scene_text_p: share of all photos with signs of the scene, which are not in the mask.
        opacity: of a mark.
        faint_p: share of the marks that are fainter than
        faint_below: this opacity.
        blend_p: share of the marks that multiply, screen or overlay the photo instead of covering it.
        mask_rule: half: pixels that a stroke covers by half or more; any: by any amount; alpha_visible: by half, where
            they have changed by `least_change`.
        least_visible: a mark is drawn again when a smaller share of its pixels
        least_change: has changed by this many levels of 255, or
        least_mask: when it covers less than this share of the photo. After eight times it is left out.
        distortions: what happens to the marked photo, as keyword arguments of `data.distortions.Distortions`.

    Shape:
        `(photo, rng)`: uint8 `(H, W, 3)` -> `Example` of the same size. Its record has "clean", "marks" (a dict for
        each: what `draw_mark` says, "opacity", "mode"), "signs", "distortions", and "left_out", the number of marks
        that could not be made visible.

    Raises:
        ValueError: a value that cannot be used, by its key. DataError: no fonts for a script.
    """

    def __init__(
        self,
        *,
        fonts: str | Sequence[str | Path] = "auto",
        scripts: Shares = SCRIPTS,
        layouts: Shares = LAYOUTS,
        styles: Shares = STYLES,
        colours: Shares = COLOURS,
        size: Range = (0.03, 0.3),
        angle: Range = (-90, 90),
        clean_p: float = 0.15,
        several_p: float = 0.2,
        num_marks: int = 3,
        scene_text_p: float = 0.1,
        opacity: Range = (0.1, 0.9),
        faint_p: float = 0.5,
        faint_below: float = 0.4,
        blend_p: float = 0.15,
        mask_rule: str = "half",
        least_visible: float = 0.5,
        least_change: float = 4,
        least_mask: float = 0.001,
        **distortions: Any,
    ) -> None:
        self.drawing: dict[str, Any] = {
            "scripts": _shares("scripts", scripts, SCRIPTS),
            "layouts": _shares("layouts", layouts, LAYOUTS),
            "styles": _shares("styles", styles, STYLES),
            "colours": _shares("colours", colours, COLOURS),
            "size": check_range("size", size, least=0.005, most=1),
            "angle": check_range("angle", angle, least=-180, most=180),
        }
        self.scripts = [name for name, share in self.drawing["scripts"].items() if share > 0]
        self.clean_p = number("clean_p", clean_p, least=0, most=1)
        self.several_p = number("several_p", several_p, least=0, most=1)
        self.num_marks = whole_number("num_marks", num_marks, least=1)
        self.scene_text_p = number("scene_text_p", scene_text_p, least=0, most=1)
        self.opacity = check_range("opacity", opacity, least=0, most=1)
        self.faint_p = number("faint_p", faint_p, least=0, most=1)
        self.faint_below = number("faint_below", faint_below, least=0, most=1)
        self.blend_p = number("blend_p", blend_p, least=0, most=1)
        if mask_rule not in MASK_RULES:
            raise ValueError(f"mask_rule must be one of {', '.join(MASK_RULES)}, got {mask_rule!r}")
        self.mask_rule = mask_rule
        self.least_visible = number("least_visible", least_visible, least=0, most=1)
        self.least_change = number("least_change", least_change, least=0, most=255)
        self.least_mask = number("least_mask", least_mask, least=0.001, most=1)  # what data/marks.py draws at least
        self.distortions = Distortions(**distortions)
        self.fonts = FontBook(fonts)
        for script in self.scripts:
            self.fonts.choose(np.random.default_rng(0), script)  # refuses a script without font here, not in training

    def __call__(self, photo: np.ndarray, rng: np.random.Generator) -> Example:
        plan, scene, drawing, spoiling = rng.spawn(4)
        opacities = self._opacities(plan)
        image, signs = photo, []
        if scene.random() < self.scene_text_p:
            image, signs = draw_scene_text(photo, scene, fonts=self.fonts, scripts=self.scripts)
        mask = np.zeros(photo.shape[:2], dtype=np.uint8)
        marks = []
        for opacity in opacities:
            added = self._add_mark(image, drawing, opacity)
            if added is not None:
                image, part, info = added
                np.maximum(mask, part, out=mask)
                marks.append(info)
        image, distortions = self.distortions(image, spoiling)
        record = {
            "clean": not marks,
            "marks": marks,
            "signs": signs,
            "distortions": distortions,
            "left_out": len(opacities) - len(marks),
        }
        return Example(image, mask, record)

    def _opacities(self, rng: np.random.Generator) -> list[float]:
        """Of each mark that the photo gets; none for a clean one."""
        clean, several = rng.random(2) < (self.clean_p, self.several_p)
        count = int(rng.integers(2, self.num_marks + 1)) if several and self.num_marks > 1 else 1
        low, high = self.opacity
        middle = min(max(self.faint_below, low), high)
        opacities = []
        for _ in range(0 if clean else count):
            # Where the range lies on one side of the limit, all are drawn from it.
            faint = middle > low and (rng.random() < self.faint_p or middle == high)
            opacities.append(float(rng.uniform(low, middle) if faint else rng.uniform(middle, high)))
        return opacities

    def _add_mark(
        self, photo: np.ndarray, rng: np.random.Generator, opacity: float
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
        """The photo with one mark, the mark's mask and what was drawn; None if no drawing of it can be seen."""
        for _ in range(_TRIES):
            mark = draw_mark(rng, *photo.shape[:2], fonts=self.fonts, **self.drawing)
            mode = MODES[rng.integers(1, len(MODES))] if rng.random() < self.blend_p else MODES[0]
            image = marked(photo, mark, opacity, mode)
            change = change_of(photo, image)
            mask = mask_of(mark.coverage, change, rule=self.mask_rule, least_change=self.least_change)
            visible = visible_share(change, mask, least_change=self.least_change)
            if visible >= self.least_visible and mask.mean() >= self.least_mask:
                return image, mask, mark.info | {"opacity": opacity, "mode": mode}
        return None


def marked(photo: np.ndarray, mark: Mark, opacity: float, mode: str = "normal") -> np.ndarray:
    """The photo with the mark over it. uint8 `(H, W, 3)` -> uint8 `(H, W, 3)`"""
    rows, columns = np.flatnonzero(mark.coverage.any(1)), np.flatnonzero(mark.coverage.any(0))
    if not len(rows):
        return photo.copy()
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # most marks cover a corner only
    image = photo.copy()
    image[part] = to_uint8(composite(photo[part], mark.colour[part], opacity * mark.coverage[part], mode=mode))
    return image


def _shares(name: str, shares: Shares, known: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """A share for each name. Raises ValueError."""
    if isinstance(shares, list | tuple):
        shares = dict.fromkeys(shares, 1.0)
    if not isinstance(shares, Mapping) or not shares or not set(shares) <= set(known):
        raise ValueError(f"{name} must be a list of some of {', '.join(known)}, or a share for each, got {shares!r}")
    values = [number(f"{name}.{key}", share, least=0, most=math.inf) for key, share in shares.items()]
    if not 0 < sum(values) < math.inf:
        raise ValueError(f"{name} must have a share above 0, got {dict(shares)!r}")
    return dict(zip(shares, values, strict=True))
