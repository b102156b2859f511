"""Font files that text is drawn with, and which of them can write which script.

Decisions that are not obvious
* Pillow draws an empty box where a font has no glyph, without a word. So a text is looked up in the font's character
  map (cmap) before it is drawn, and what the font lacks is refused.
* The packages of `PACKAGES` are located, never imported: importing some of them changes matplotlib's settings.
* Only paths are pickled to workers; character maps are read again there, when a font is first used.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError

from data.errors import DataError

SUFFIXES = (".ttf", ".otf", ".ttc")

# package -> font files in it. Each licence allows drawing pictures with the font and passing it on.
PACKAGES = {
    "matplotlib": "mpl-data/fonts/ttf/DejaVu*.ttf",  # Bitstream Vera licence, changes in the public domain
    "font_roboto": "files/*.ttf",  # Apache License 2.0
    "zhplot": "fonts/*.ttf",  # Noto Sans SC: SIL Open Font License 1.1, enclosed
    "matplotlib_fontja": "fonts/*.ttf",  # IPAex Gothic: IPA Font License 1.0, enclosed
    "koreanize_matplotlib": "fonts/*.ttf",  # Nanum Gothic: SIL OFL 1.1 by its publisher Naver; no copy enclosed
}

# A font that has these and the ten digits can write the script.
PROBES = {
    "latin": "ABCMWXYZabcgqxyz.,-/@",
    "chinese": "的一是了我不人在有他这中大来上国样图版权禁复",
    "japanese": "あいうのをんアイウカタンー見本日版複写禁",
    "korean": "가나다라마한글견본복사금지",
    "cyrillic": "АБВЖЩЫЯабвжщыяЁё",
}


class FontBook:
    """The fonts in use.

    Args:
        sources: "auto" for the files of those `PACKAGES` that are installed, or a list of which each entry is a font
            file, a folder (searched with its subfolders for .ttf, .otf and .ttc) or the name of one of the packages.

    Attributes:
        files: the font files, sorted, each once.
        scripts: the scripts that at least one of them can write.

    Raises:
        DataError: an entry that is none of these, a file that is not a font, or no font at all.
    """

    def __init__(self, sources: str | Sequence[str | Path] = "auto") -> None:
        if isinstance(sources, str) and sources != "auto":
            raise DataError(f"fonts must be auto or a list of font files, folders and packages, got {sources!r}")
        if sources == "auto":
            found = [file for package in PACKAGES for file in _package_files(package)]
        else:
            found = [file for source in sources for file in _source_files(source)]
        self.files = sorted(set(found))
        if not self.files:
            raise DataError("no font was found: pip install -r requirements.txt, or give data.synthesis.fonts=[folder]")
        self._by_script: dict[str, list[str]] = {
            script: files for script in PROBES if (files := [file for file in self.files if _writes(file, script)])
        }

    @property
    def scripts(self) -> tuple[str, ...]:
        return tuple(self._by_script)

    def covers(self, font: str, text: str) -> bool:
        """Whether the font has a glyph for every character of the text."""
        return all(ord(character) in _glyphs(font) for character in text)

    def choose(self, rng: np.random.Generator, script: str) -> str:
        """The path of a font that can write the script, each with the same chance. Raises DataError if none can."""
        files = self._by_script.get(script)
        if not files:
            raise DataError(
                f"none of the {len(self.files)} fonts can write {script}: add one that can, "
                f"or leave {script} out of data.synthesis.scripts"
            )
        return files[rng.integers(len(files))]


def _package_files(package: str) -> list[str]:
    """The package's font files; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [str(file) for folder in folders or () for file in sorted(Path(folder).glob(PACKAGES[package]))]


def _source_files(source: str | Path) -> list[str]:
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise DataError(f"{source}: the folder holds no font ({', '.join(SUFFIXES)})")
        return files
    if source in PACKAGES:
        if files := _package_files(str(source)):
            return files
        raise DataError(f"{source}: the font package is not installed, pip install {str(source).replace('_', '-')}")
    raise DataError(f"{source}: no such font file or folder, and not one of the font packages {', '.join(PACKAGES)}")


def _writes(file: str, script: str) -> bool:
    glyphs = [_glyphs(file).get(ord(character)) for character in PROBES[script] + "0123456789"]
    # A fallback font that draws one placeholder for a whole block of characters has them all in its map.
    return None not in glyphs and len(set(glyphs)) == len(glyphs)


@functools.lru_cache(maxsize=512)
def _glyphs(file: str) -> dict[int, str]:
    """Code point -> number of the glyph that the font draws for it; of a collection, its first font."""
    try:
        with TTFont(file, lazy=True, fontNumber=0) as font:
            # Numbers for names: making up names for 30 000 glyphs takes longer than reading the map.
            font.setGlyphOrder([str(glyph) for glyph in range(font["maxp"].numGlyphs)])
            characters = font.getBestCmap() or {}
    except (TTLibError, OSError, ValueError, KeyError, AssertionError) as error:
        raise DataError(f"{file}: not a font that can be read ({error}); take it out of data.synthesis.fonts") from None
    return {character: glyph for character, glyph in characters.items() if glyph != "0"}  # 0: .notdef
