"""Words and fonts of rendered documents, split once, by name, into a part for training and a part that only evaluation sees.

They come with pip-installed packages (the `documents` extra), so that a document is the same on every machine:

    python scripts/synthetic/materials.py                                what there is, as runs record it
    MINIMONKEY_SYSTEM_FONTS=1 python scripts/finetune.py RECIPE.yaml     also the system's fonts of the families below
"""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from PIL import ImageFont


WORD_PACKAGE = "spellchecker"
# Packages with fonts, and where in them. If several have the same font, that of the first counts.
FONT_PACKAGES = {
    "matplotlib": "mpl-data/fonts/ttf",
    "rendercv_fonts": ".",
    "pymupdf_fonts": ".",  # each font as a Python module
    "font_source_serif_pro": "files",
    "font_manrope": "files",
    "font_caladea": "files",
}
DISTRIBUTIONS = {WORD_PACKAGE: "pyspellchecker"} | {name: name.replace("_", "-") for name in FONT_PACKAGES}
SYSTEM_FONTS = "MINIMONKEY_SYSTEM_FONTS"
SYSTEM_FOLDERS = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path("/Library/Fonts"),
    Path("/System/Library/Fonts"),
    Path("C:/Windows/Fonts"),
)

# Families by the beginning of their files' names. No family on one side has a clone or a direct ancestor on the other
# (Carlito, say, is drawn after Lato, and Fira Mono and Fira Code after one another).
FAMILIES = {
    "training": (
        *("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral"),
        *("Fontin", "Mukta", "NotoSans-", "OpenSans", "OpenSauceSans", "Raleway", "Roboto", "SourceSans3", "Ubuntu-"),
        *("XCharter", "CascadiaMono", "SpaceMono", "UbuntuMono", "SourceSerifPro", "Manrope"),
        # of Debian's packages
        *("LiberationSans", "LiberationSerif", "LiberationMono", "FreeSans", "FreeSerif", "FreeMono"),
        *("NotoSansMono-", "NotoSerif-", "NotoSansDisplay-", "NotoSerifDisplay-", "Inconsolata", "Hack", "Comfortaa"),
        *("Cantarell", "LinLibertine_R", "LinBiolinum_R", "LinBiolinum_B", "GFSDidot", "C059", "NimbusSans"),
        *("NimbusRoman", "NimbusMonoPS", "P052", "URWBookman", "URWGothic", "Z003", "JunicodeTwoBeta", "mononoki"),
        *("Play", "Jura", "CourierPrime"),
    ),
    "held_out": (
        *("EBGaramond", "GentiumBookPlus", "Lato", "Poppins", "FiraGO", "FiraMono", "Caladea"),
        *("Carlito", "Cabin", "FiraCode", "Quicksand"),
    ),
}
UNREADABLE_STYLES = re.compile(
    r"Thin|Hairline|ExtraLight|Math|Initials|Keyboard|Beta-.*Condensed|Playfair|VariableFont|DejaVuS\w+Display"
)
MONOSPACED = ("Mono", "Courier", "Inconsolata", "Hack", "FiraCode", "mononoki")

# Most of the package's words of two or three letters are abbreviations; those of running text are frequent.
SHORT_WORD, FREQUENT = 3, 1000


def is_held_out(word: str) -> bool:
    """Tell whether a word is held out: one in ten never appears in training, in any case."""
    return hashlib.sha1(word.lower().encode()).digest()[0] % 10 == 0


@lru_cache
def words(split: str) -> dict[int, list[str]]:
    """Return lower-case English words of `split` ("training" or "held_out"), by length.

    Raises:
        FileNotFoundError: The package is missing, with what to install.
    """
    _package_folder(WORD_PACKAGE)
    counts = importlib.import_module(WORD_PACKAGE).SpellChecker(language="en").word_frequency.dictionary
    by_length: dict[int, list[str]] = {}
    for word in sorted(counts):
        is_usual = len(word) > SHORT_WORD or counts[word] >= FREQUENT
        if is_usual and re.fullmatch(r"[a-z]{2,14}", word) and is_held_out(word) == (split == "held_out"):
            by_length.setdefault(len(word), []).append(word)
    return by_length


@lru_cache
def font_families(split: str) -> tuple[tuple[Path, ...], ...]:
    """Return the font files of `split` by family, in an order independent of where they are installed.

    Raises:
        FileNotFoundError: A package is missing, with what to install.
    """
    families: dict[str, dict[str, Path]] = {}
    for path in _all_fonts():
        family = max((name for name in FAMILIES[split] if path.name.startswith(name)), key=len, default=None)
        if family is not None:
            families.setdefault(family, {}).setdefault(path.stem, path)
    return tuple(tuple(families[family].values()) for family in FAMILIES[split] if family in families)


def font_files(split: str) -> tuple[Path, ...]:
    """Return all font files of `split`."""
    return tuple(path for family in font_families(split) for path in family)


def monospaced_fonts(split: str) -> list[Path]:
    """Return the fonts whose characters are all equally wide."""
    return [path for path in font_files(split) if any(name in path.name for name in MONOSPACED)]


@lru_cache(maxsize=4096)
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Load the font at `size` pixels an em."""
    return ImageFont.truetype(io.BytesIO(_font_data(path)), size)


def materials() -> dict:
    """Describe what documents are made of here, for the record of a run: another digest means other words or fonts."""
    files = [*font_files("training"), *font_files("held_out")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.stem.encode() + hashlib.sha256(_font_data(path)).digest())
    counts = {}
    for split in FAMILIES:
        chosen = [word for same_length in words(split).values() for word in same_length]
        counts[split] = {"words": len(chosen), "fonts": len(font_files(split))}
        digest.update(" ".join(chosen).encode())
    packages = {name: version(name) for name in DISTRIBUTIONS.values()}
    return {**counts, "system_fonts": _with_system_fonts(), "packages": packages, "digest": digest.hexdigest()[:16]}


def _all_fonts() -> list[Path]:
    """Return the readable fonts of the packages, then, where they are wanted, of the system."""
    folders = [_package_folder(name) / part for name, part in FONT_PACKAGES.items()]
    folders += [folder for folder in SYSTEM_FOLDERS if _with_system_fonts() and folder.is_dir()]
    found = [sorted(folder.rglob("*"), key=lambda path: path.name) for folder in folders]
    suffixes = (".ttf", ".otf", ".py")
    return [
        path
        for paths in found
        for path in paths
        if path.suffix.lower() in suffixes and not UNREADABLE_STYLES.search(path.name)
    ]


def _with_system_fonts() -> bool:
    """Tell whether the environment asks for system fonts; processes that load data inherit it."""
    return os.environ.get(SYSTEM_FONTS, "0") not in ("", "0")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(
            f"Rendered documents need {DISTRIBUTIONS[name]}: pip install {' '.join(DISTRIBUTIONS.values())}"
        )
    return Path(spec.origin).parent


def _font_data(path: Path) -> bytes:
    if path.suffix == ".py":
        return importlib.import_module(f"{path.parent.name}.{path.stem}").fontbuffer
    return path.read_bytes()


if __name__ == "__main__":
    print(json.dumps(materials(), indent=1))
