"""Training data: InternVL's meta JSON and JSONL files, and documents rendered on the fly.

A meta JSON names datasets, each of them lines of a file or a kind of rendered document:

    {"invoices": {"root": "images", "annotation": "invoices.jsonl", "repeat_time": 2, "max_dynamic_patch": 8},
     "receipts": {"synthetic": "receipt", "length": 20000, "seed": 1, "difficulty": [0.3, 1.0], "turns": 4},
     "manuals": {"pdf": "manuals/*.pdf", "length": 5000, "lines": [1, 6], "difficulty": 0.3}}

`repeat_time` below 1 takes the first part of a dataset, a whole number repeats it. `tile_ranges`, a list of [min_tiles,
max_tiles, adaptive_min_tiles, adaptive_max_tiles], or one of these names by itself, replaces the recipe's; `use_thumbnail:
false` leaves the whole image out. A rendered document is asked one of its questions, or up to `turns` of them in one
conversation, the whole text last. Crops of `pdf` documents are cut on demand, their text layer being the answer, see
synthetic/typeset.py. Relative paths start from the folder of the meta JSON.

A line is {"image": path or [paths], "conversations": [{"from": "human", "value": "<image>\\nRead."}, {"from": "gpt", ...}]}.
All lines are checked, and measured from their image headers, before training begins.
"""

import glob
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher
from PIL import ExifTags, Image, UnidentifiedImageError

from minimonkey.conversation import IMAGE_PLACEHOLDER, begins_with_bos, check_placeholders, control_tokens
from minimonkey.scripts.synthetic import documents, first_words
from minimonkey.scripts.synthetic.canvas import Document
from minimonkey.scripts.synthetic.typeset import typeset
from minimonkey.scripts.synthetic.vocabulary import READ_ALL
from minimonkey.scripts.training.encode import Conversation, Encoder
from minimonkey.scripts.training.recipe import check_ranges
from minimonkey.tiling import RANGE_NAMES


TileRanges = tuple[int, int, int, int]
PUBLISHED_NAMES = {"min_dynamic_patch": "min_tiles", "max_dynamic_patch": "max_tiles"}
SHARED_KEYS = {"repeat_time", "length", "tile_ranges", "use_thumbnail", *RANGE_NAMES, *PUBLISHED_NAMES}
FILE_KEYS = {"root", "annotation", "data_augment"}
SYNTHETIC_KEYS = {"synthetic", "seed", "split", "difficulty", "turns"}
PDF_KEYS = {"pdf", "seed", "lines", "difficulty", "turns"}
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Example:
    """A conversation and its images."""

    conversation: Conversation
    pictures: list
    characters: Sequence = ()
    """The characters of a rendered document and their places, see letters.py."""


@dataclass(frozen=True)
class Source:
    """What the datasets of a meta JSON have in common."""

    name: str
    ranges: tuple[TileRanges, ...]
    use_thumbnail: bool
    size: int
    """Examples of one round, after a `repeat_time` below 1."""
    repeats: int

    def example(self, index: int, round_: int, attempt: int = 0) -> Example:
        """Return an example of the dataset. `round_` counts repetitions and epochs."""
        raise NotImplementedError

    def tile_range(self, index: int, round_: int, seed: int) -> TileRanges:
        """Return the tile ranges of this sample: always the same for the same arguments."""
        if len(self.ranges) == 1:
            return self.ranges[0]
        return random.Random(f"{seed}/tiles/{self.name}/{index}/{round_}").choice(self.ranges)


@dataclass(frozen=True)
class FileSource(Source):
    """The lines of a JSONL file."""

    rows: Dataset = field(repr=False)

    def example(self, index: int, round_: int, attempt: int = 0) -> Example:
        row = self.rows[index]
        return Example(_conversation(row), row["images"])


@dataclass(frozen=True)
class DrawnSource(Source):
    """Documents made on demand; every round brings new ones."""

    seed: int
    difficulty: tuple[float, float]
    """Difficulty of the first and of the last document of a round."""
    turns: int
    """Most questions about one document."""

    MOST_ATTEMPTS = 8

    def example(self, index: int, round_: int, attempt: int = 0) -> Example:
        """Make a conversation about one document; every attempt takes another document."""
        number = index + self.size * (round_ * self.MOST_ATTEMPTS + attempt)
        low, high = self.difficulty
        drawn = self.document(number, low + (high - low) * index / max(1, self.size - 1))
        rng = random.Random(f"{self.seed}/question/{number}")
        count = min(rng.randint(1, self.turns), len(drawn.questions))
        # The whole text comes last: later answers would be copied from it instead of being read from the image.
        questions = sorted(rng.sample(drawn.questions, count), key=lambda question: question.text in READ_ALL)
        turns = [(question.text, question.answer) for question in questions]
        turns[0] = (f"{IMAGE_PLACEHOLDER}\n{turns[0][0]}", turns[0][1])
        return Example(Conversation(tuple(turns)), [drawn.image], drawn.characters)

    def document(self, number: int, difficulty: float) -> Document:
        """Make document `number`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SyntheticSource(DrawnSource):
    """Documents rendered from words and fonts."""

    kind: str
    split: str

    def document(self, number: int, difficulty: float) -> Document:
        if self.kind in first_words.KINDS:
            return first_words.KINDS[self.kind](number, self.seed, difficulty)
        return documents.document(self.kind, number, self.seed, self.split, difficulty)


@dataclass(frozen=True)
class PdfSource(DrawnSource):
    """Lines and blocks of lines cut out of PDF documents."""

    paths: tuple[Path, ...]
    lines: tuple[int, int]

    def document(self, number: int, difficulty: float) -> Document:
        return typeset(self.paths, random.Random(f"{self.seed}/{self.name}/{number}"), self.lines, difficulty)


# --- meta JSON -------------------------------------------------------------------------------------------------------


def read_sources(data: str | dict, folder: Path, ranges: list[list[int]], encoder: Encoder) -> list[Source]:
    """Read the datasets of a meta JSON, with every line of their files checked and measured.

    Args:
        data: Path of a meta JSON from `folder`, or its content.
        ranges: Tile ranges of datasets that have none of their own.

    Raises:
        ValueError: Wrong keys, files or lines, with file and line number.
    """
    if isinstance(data, str):
        path = folder / data
        if not path.is_file():
            raise ValueError(f"There is no meta JSON {path}.")
        folder, data = path.parent, parse_json(path.read_bytes(), str(path))
    if not isinstance(data, dict) or not data or not all(isinstance(entry, dict) for entry in data.values()):
        raise ValueError('A meta JSON is {"name": {"annotation": ..., ...}, ...}, see scripts/training/data.py.')
    return [_read_source(name, entry, folder, ranges, encoder) for name, entry in data.items()]


def _read_source(name: str, entry: dict, folder: Path, ranges: list[list[int]], encoder: Encoder) -> Source:
    own_keys = SYNTHETIC_KEYS if "synthetic" in entry else PDF_KEYS if "pdf" in entry else FILE_KEYS
    unknown = entry.keys() - own_keys - SHARED_KEYS
    if unknown:
        known = ", ".join(sorted(own_keys | SHARED_KEYS))
        raise ValueError(f"Dataset {name}: unknown {', '.join(sorted(unknown))}; known are {known}.")
    chosen, use_thumbnail = (
        _tile_ranges(name, entry, ranges),
        entry.get("use_thumbnail", encoder.image_processor.use_thumbnail),
    )
    if not isinstance(use_thumbnail, bool):
        raise ValueError(f"Dataset {name}: use_thumbnail is true or false, got {use_thumbnail!r}.")
    part, repeats = _repeats(name, entry.get("repeat_time", 1))
    if "synthetic" in entry:
        return _synthetic_source(name, entry, chosen, use_thumbnail, part, repeats)
    if "pdf" in entry:
        return _pdf_source(name, entry, folder, chosen, use_thumbnail, part, repeats)
    rows = _read_lines(name, entry, folder, encoder)
    if entry.get("length", len(rows)) != len(rows):
        print(f"Dataset {name}: the meta JSON says {entry['length']} lines, the file has {len(rows)}.")
    return FileSource(name, chosen, use_thumbnail, _part(name, len(rows), part), repeats, rows)


def _tile_ranges(name: str, entry: dict, ranges: list[list[int]]) -> tuple[TileRanges, ...]:
    single = {PUBLISHED_NAMES.get(key, key): entry[key] for key in (*RANGE_NAMES, *PUBLISHED_NAMES) if key in entry}
    if "tile_ranges" in entry and single:
        raise ValueError(f"Dataset {name}: tile_ranges or {', '.join(single)}, not both.")
    ranges = entry.get("tile_ranges", ranges)
    if single:
        ranges = [[single.get(key, default) for key, default in zip(RANGE_NAMES, chosen)] for chosen in ranges]
    check_ranges(ranges, f"Dataset {name}: tile_ranges")
    return tuple(map(tuple, ranges))


def _repeats(name: str, repeat_time) -> tuple[float, int]:
    """Return which part of a dataset is taken, and how often."""
    is_number = isinstance(repeat_time, (int, float)) and not isinstance(repeat_time, bool)
    if not is_number or repeat_time <= 0 or (repeat_time > 1 and repeat_time != int(repeat_time)):
        raise ValueError(f"Dataset {name}: repeat_time is a part below 1 or a whole number, got {repeat_time!r}.")
    return min(repeat_time, 1), max(1, int(repeat_time))


def _part(name: str, length: int, part: float) -> int:
    size = int(length * part)
    if size < 1:
        raise ValueError(f"Dataset {name}: repeat_time {part} of {length} examples is none.")
    return size


def _synthetic_source(
    name: str, entry: dict, ranges: tuple[TileRanges, ...], use_thumbnail: bool, part: float, repeats: int
) -> SyntheticSource:
    kind = entry["synthetic"]
    known = (*documents.KINDS, *first_words.KINDS)
    if kind not in known:
        raise ValueError(f"Dataset {name}: there are no synthetic documents {kind!r}; known are {', '.join(known)}.")
    if kind in first_words.KINDS and entry.get("split", "training") != "training":
        raise ValueError(f"Dataset {name}: {kind} is for training alone, got split {entry['split']!r}.")
    length, drawn = _drawn(name, entry)
    source = SyntheticSource(
        *(name, ranges, use_thumbnail, _part(name, length, part), repeats),
        kind=kind,
        split=entry.get("split", "training"),
        **drawn,
    )
    return _tried(source)


def _pdf_source(
    name: str, entry: dict, folder: Path, ranges: tuple[TileRanges, ...], use_thumbnail: bool, part: float, repeats: int
) -> PdfSource:
    patterns = [entry["pdf"]] if isinstance(entry["pdf"], str) else entry["pdf"]
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Dataset {name}: pdf is a path, a pattern or a list of them, got {entry['pdf']!r}.")
    found = {pattern: sorted(map(Path, glob.glob(str(folder / pattern), recursive=True))) for pattern in patterns}
    for pattern, paths in found.items():
        if not paths:
            raise ValueError(f"Dataset {name}: no file fits {folder / pattern}.")
    lines = entry.get("lines", [1, 6])
    if not isinstance(lines, list) or [type(n) for n in lines] != [int, int] or not 1 <= lines[0] <= lines[1]:
        raise ValueError(f"Dataset {name}: lines is [fewest, most] lines of a crop, got {lines!r}.")
    length, drawn = _drawn(name, entry)
    paths = tuple(dict.fromkeys(path for paths in found.values() for path in paths))
    source = PdfSource(
        *(name, ranges, use_thumbnail, _part(name, length, part), repeats), paths=paths, lines=tuple(lines), **drawn
    )
    return _tried(source)


def _drawn(name: str, entry: dict) -> tuple[int, dict]:
    """Return length, and the options that all documents made on demand have."""
    length, seed, turns = entry.get("length"), entry.get("seed", 1), entry.get("turns", 1)
    if not isinstance(length, int) or length < 1 or not isinstance(seed, int):
        raise ValueError(f"Dataset {name}: length must be a number of documents, seed a number; got {entry}.")
    difficulty = entry.get("difficulty", 1.0)
    difficulty = difficulty if isinstance(difficulty, list) else [difficulty, difficulty]
    if len(difficulty) != 2 or not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in difficulty):
        raise ValueError(
            f"Dataset {name}: difficulty is [from, to] or one number, 0 to 1, got {entry['difficulty']!r}."
        )
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise ValueError(f"Dataset {name}: turns must be a whole number of at least 1, got {turns!r}.")
    return length, {"seed": seed, "difficulty": tuple(difficulty), "turns": turns}


def _tried(source: DrawnSource) -> DrawnSource:
    """Return the source after its first and last document were made.

    Raises:
        ValueError: They cannot be: no such split or difficulty, no fonts, no lines, a broken PDF.
    """
    try:
        for index in (0, source.size - 1):
            source.example(index, 0)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise ValueError(f"Dataset {source.name}: {error}") from error
    return source


# --- JSONL -----------------------------------------------------------------------------------------------------------


def _read_lines(name: str, entry: dict, folder: Path, encoder: Encoder) -> Dataset:
    """Read an annotation file as rows: images, system, questions, answers, text_tokens, sizes (height, width)."""
    if "annotation" not in entry:
        raise ValueError(
            f"Dataset {name} needs an annotation (a JSONL file), synthetic (a kind of document) or pdf (files to cut)."
        )
    if entry.get("data_augment"):
        raise ValueError(f"Dataset {name}: data_augment is not supported; leave it out or false.")
    annotation, root = folder / entry["annotation"], folder / entry.get("root", "")
    if not annotation.is_file():
        raise ValueError(f"Dataset {name}: there is no annotation file {annotation}.")
    lines = load_dataset("text", data_files=str(annotation), split="train")
    reader = LineReader(annotation, root, encoder)
    code = [Path(__file__).with_name(file).read_bytes() for file in ("data.py", "encode.py")]
    rows = lines.map(
        reader,
        with_indices=True,
        remove_columns=["text"],
        # The processor's classes have no stable hash; the settings that decide the rows do.
        new_fingerprint=Hasher.hash([lines._fingerprint, reader.key(), code]),
        desc=f"Checking {name}",
    )
    if len(rows) == 0:
        raise ValueError(f"Dataset {name}: {annotation} is empty.")
    return rows


class LineReader:
    """One line of a JSONL file as a row, checked."""

    def __init__(self, annotation: Path, root: Path, encoder: Encoder):
        self.annotation, self.root, self.encoder = annotation, root, encoder

    def key(self) -> list:
        """Return everything, apart from the lines, that decides the rows."""
        encoder = self.encoder
        spelled = [
            str(self.root),
            begins_with_bos(encoder.tokenizer),
            str(encoder.template),
            encoder.system_message,
            *control_tokens(encoder.tokenizer, encoder.grounding_tokens),
        ]
        return [*spelled, encoder.tokenizer.backend_tokenizer.to_str()]

    def __call__(self, row: dict, index: int) -> dict:
        where = f"{self.annotation}, line {index + 1}"
        parsed = parse_line(row["text"], where)
        images = [self.root / image for image in parsed["images"]]
        sizes = [picture_size(image, where) for image in images]
        try:
            tokens = self.encoder.text_length(_conversation(parsed), len(images))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return {**parsed, "images": list(map(str, images)), "text_tokens": tokens, "sizes": sizes}


def parse_line(text: str, where: str) -> dict:
    """Return images, system message, questions and answers of a line.

    Raises:
        ValueError: Anything that is not the InternVL format, with `where` it is.
    """
    line = parse_json(text, where)
    if not isinstance(line, dict) or "conversations" not in line:
        raise ValueError(f"{where}: a line is an object with conversations (and image), got {text[:80]!r}.")
    if "video" in line:
        raise ValueError(f"{where}: videos are not supported; give frames as a list of images.")
    images = line.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: image must be a path or a list of paths, got {images!r}.")
    system, turns = _turns(line["conversations"], where)
    texts = [text for turn in turns for text in turn]
    check_placeholders(texts, len(images), f"{where}: the conversation")
    return {"images": images, "system": system, "questions": texts[0::2], "answers": texts[1::2]}


def _turns(messages, where: str) -> tuple[str | None, list[tuple[str, str]]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: conversations must be a list of {{"from": ..., "value": ...}}.')
    for message in messages:
        if not isinstance(message.get("value"), str) or not message["value"].strip():
            raise ValueError(f"{where}: the value of a message must be text that is not empty, got {message!r}.")
    system = messages[0]["value"] if messages and messages[0].get("from") == "system" else None
    messages = messages if system is None else messages[1:]
    speakers = [message.get("from") for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"{where}: human and gpt must alternate, human first and gpt last; got {speakers}.")
    values = [message["value"] for message in messages]
    return system, list(zip(values[0::2], values[1::2]))


def picture_size(path: Path, where: str) -> tuple[int, int]:
    """Return (height, width) of an image, upright, from the header of its file."""
    if not path.is_file():
        raise ValueError(f"{where}: there is no picture {path}.")
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {path} cannot be read as a picture: {error}") from error
    return (width, height) if is_sideways else (height, width)


def parse_json(text: str | bytes, where: str):
    """Parse JSON.

    Raises:
        ValueError: It is none, with `where` it stands.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is not JSON: {error}") from error


def _conversation(row: dict) -> Conversation:
    return Conversation(tuple(zip(row["questions"], row["answers"])), row["system"])
