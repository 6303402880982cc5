"""A new model folder: where it is made, and what it holds besides the weights."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import GenerationConfig

from minimonkey.conversation import chat_template_jinja, get_template
from minimonkey.image_processing_minimonkey import MiniMonkeyImageProcessor
from minimonkey.processing_minimonkey import MiniMonkeyProcessor
from minimonkey.scripts.importing.weights import missing_weights


# In OUT.partial: says that the folder is ours, and which source it is made from.
RECORD_NAME = "unfinished-minimonkey.json"
RECORD_KIND = "MiniMonkey, unfinished"
LOCK_NAME = ".unfinished-minimonkey.lock"


def check_free(out: Path) -> None:
    """Raise `ValueError` if something is in the way of a new folder, or of OUT.partial where it is made."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} exists already; remove it or choose another folder.")
    work = _work_folder(out)
    is_ours = work.is_dir() and not work.is_symlink() and ({*_names(work)} <= {LOCK_NAME} or _record(work) is not None)
    if (work.exists() or work.is_symlink()) and not is_ours:
        raise ValueError(
            f"{work} exists and is not an unfinished import; move it away or choose another OUT than {out}."
        )


@contextmanager
def new_folder(out: Path, source: str) -> Iterator[Path]:
    """Make OUT in OUT.partial, which becomes OUT at the end of the `with` block, if it is complete.

    After an interruption what is there is reused if it has the same source. After an error it is deleted, except for shards
    that are complete when a file could not be written: a full disk costs no more than the rest.

    Args:
        source: What tells one source from another.

    Raises:
        ValueError: Something is in the way, another run is writing the same OUT, or the result lacks files.
    """
    check_free(out)
    work = _work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another run is writing {out} (in {work}); wait for it, or choose another folder.") from error
    with lock:
        check_free(out)
        if _record(work) != source:
            _clear(work)
        (work / RECORD_NAME).write_text(json.dumps({"kind": RECORD_KIND, "source": source}), encoding="utf-8")
        try:
            yield work
            _finish(work, out)
        except OSError:
            if not any(work.glob("*.safetensors")):
                shutil.rmtree(work)
            raise
        except ValueError:
            shutil.rmtree(work)
            raise


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _record(work: Path) -> str | None:
    """Return the source that an unfinished folder of ours belongs to, None for any other folder."""
    try:
        record = json.loads((work / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(record, dict) and record.get("kind") == RECORD_KIND
    return str(record.get("source")) if is_ours else None


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name == LOCK_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finish(work: Path, out: Path) -> None:
    missing = [name for name in ("config.json",) if not (work / name).is_file()] + missing_weights(work)
    if missing:
        raise ValueError(f"{work} lacks {', '.join(missing)}; something took them away. Start again.")
    check_free(out)
    if out.exists():
        out.rmdir()
    work.replace(out)
    for name in (RECORD_NAME, LOCK_NAME):  # after the rename: a run that is killed before it can be resumed
        (out / name).unlink()


def image_processor(config, **options):
    """Return the image processor of a model of this configuration; `options` are its own, a preset or tiling for example."""
    size = {"height": config.tile_size, "width": config.tile_size}
    return MiniMonkeyImageProcessor(size=size, slice_multiple=config.view_multiple, **options)


def save_processor(folder: Path, config, tokenizer, with_bos: bool, **options) -> None:
    """Save tokenizer, image processor and chat template as one processor."""
    template = get_template(config.template)
    jinja = chat_template_jinja(template, config.system_message, with_bos)
    MiniMonkeyProcessor(
        image_processor(config, **options),
        tokenizer,
        image_seq_length=config.image_seq_length,
        projector=config.projector,
        mining=config.mining,
        chat_template=jinja,
    ).save_pretrained(folder)


def generation_config(config, tokenizer) -> GenerationConfig:
    """Return a generation configuration whose answers end with the template's separator."""
    separator = tokenizer.convert_tokens_to_ids(get_template(config.template).separator)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=separator,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else separator,
    )
