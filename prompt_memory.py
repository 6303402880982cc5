"""What a conversation remembers of its prompt, so that its next turn costs only what is new.

Three things, all of one conversation: the features of its images, which positions of its ids the language model read
(scale compression leaves some out), and the key/value cache of those. A later prompt uses the cache as far as it begins with
the same tokens and the same images, compressed in the same way; everything after that is computed again. So an edited
history can never meet a cache that does not fit it.

Deals with ids, tensors and caches, not with text. `generate` reads and writes a memory, `chat` hangs it on the history it
returns.
"""

import hashlib
import os
import threading
import weakref
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Cache, DynamicLayer

from .compression import CompressionSettings, ImageSpan
from .image_decoding import to_rgb
from .media_sources import check_file, path_of, short_name
from .quantized_cache import Int8Layer, empty_cache


def common_length(first: list[int], second: list[int]) -> int:
    """Count the tokens that two sequences share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


@dataclass(frozen=True)
class Prompt:
    """What decides what the language model computes: the ids of one row (N,), which images stand where, and how these are
    compressed (`settings.keep_ratio` 1: not at all)."""

    token_ids: list[int]
    images: list[tuple[bytes, ImageSpan]]
    settings: CompressionSettings

    def common_start(self, other: "Prompt") -> int:
        """Count its first tokens that mean the same in `other`: all that the language model computes for them is equal."""
        same = common_length(self.token_ids, other.token_ids)
        is_compressed, is_compressed_alike = self.settings.compresses or other.settings.compresses, False
        if is_compressed:
            is_compressed_alike = replace(self.settings, query_ends=None) == replace(other.settings, query_ends=None)
        for i, (key, span) in enumerate(self.images):
            if span.start >= same:
                break
            other_key, other_span = other.images[i] if i < len(other.images) else (None, None)
            is_same = key == other_key and span.stop <= same
            if is_compressed and span.detailed_tokens:
                is_same = is_same and is_compressed_alike and span == other_span and span.query_stop <= same
            if not is_same:
                return span.start
        return same


@dataclass
class _State:
    """A cache, the prompt and answer that it is of, and which of their positions (M,) it holds."""

    prompt: Prompt
    kept: torch.Tensor
    cache: Cache


@dataclass(frozen=True)
class Recalled:
    """A cache that serves the first `start` tokens of a prompt, of which it holds the positions `kept` (M,)."""

    cache: Cache | None = None
    start: int = 0
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class PromptMemory:
    """The memory of one conversation with `model`; a plain object to everyone but `generate`.

    Training, replacing or moving weights or buffers, or changing the model's configuration, makes it void; a
    change through `parameter.data` in place is not noticed, so call `forget` after one.

    `tile_counts`, `tile_grids`, `features` and, where compression asked, `blank` tokens are those of its images, by their key
    (see `image_key`).
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)  # a history must not keep a model alive
        self._weights = _weights_version(model)
        self.tile_counts: dict[bytes, list[int]] = {}
        self.tile_grids: dict[bytes, list[int]] = {}
        self.features: dict[bytes, torch.Tensor] = {}
        self.blank: dict[bytes, torch.Tensor] = {}
        self._state: _State | None = None
        self._lock = threading.Lock()
        self._beginning: list[tuple] = []

    def belongs_to(self, model: nn.Module) -> bool:
        """Tell whether this is a memory of `model`, with its weights unchanged since."""
        return self._model() is model and self._weights == _weights_version(model)

    def forget(self) -> None:
        """Free everything; the next turn is computed from the start."""
        self._state, self.tile_counts, self.tile_grids, self.features, self.blank = None, {}, {}, {}, {}

    def extend_beginning(self, answer: str) -> None:
        """Note what was answered to the messages by which this memory was found; nothing for any other."""
        if self._beginning:
            self._beginning.append(("assistant", answer))

    def nbytes(self) -> int:
        """Count the bytes that it holds: keys, values and features."""
        layers = [] if self._state is None else self._state.cache.layers
        tensors = [*self.features.values(), *(t for layer in layers for t in (layer.keys, layer.values))]
        return sum(tensor.nbytes for tensor in tensors)

    def remember_images(self, images: dict[bytes, tuple[list[int], list[int], torch.Tensor]]) -> None:
        """Keep the tile counts, grids and features of exactly these images, those of the prompt that is about to be read."""
        self.tile_counts = {key: counts for key, (counts, _, _) in images.items()}
        self.tile_grids = {key: grids for key, (_, grids, _) in images.items()}
        self.features = {key: features for key, (_, _, features) in images.items()}
        self.blank = {key: blank for key, blank in self.blank.items() if key in images}
        forget_the_oldest(self._model(), self)

    def take_cache(self, prompt: Prompt) -> Recalled:
        """Take out the cache of as much of `prompt` as it can serve; at least the prompt's last token is left to compute.

        The memory has no cache until `remember`: should the generation fail, or two run at once, none meets a cache that
        is half written.
        """
        with self._lock:
            state, self._state = self._state, None
        if state is None:
            return Recalled()
        start = min(prompt.common_start(state.prompt), len(prompt.token_ids) - 1)
        kept = state.kept[state.kept < start]
        if not len(kept):
            return Recalled()
        surplus = state.cache.get_seq_length() - len(kept)
        if surplus < 0:  # emptied by an engine that holds another conversation now
            return Recalled()
        if surplus:
            state.cache.crop(-surplus)
        return Recalled(state.cache, start, kept)

    def remember(self, prompt: Prompt, kept: torch.Tensor, cache: Cache, new_ids: list[int]) -> None:
        """Keep `cache`, which holds the positions `kept` of the prompt and of the new tokens all that were read."""
        answered = cache.get_seq_length() - len(kept)
        if not _holds_everything(cache):
            return
        length = len(prompt.token_ids)
        whole = replace(prompt, token_ids=[*prompt.token_ids, *new_ids[:answered]])
        self._state = _State(whole, torch.cat([kept.cpu(), torch.arange(length, length + answered)]), cache)
        forget_the_oldest(self._model(), self)


@dataclass(frozen=True)
class Turn:
    """What a turn starts from: its images in order, and the tiles and features of those that the memory knows."""

    memory: PromptMemory
    keys: list[bytes]
    tile_counts: dict[bytes, list[int]]
    tile_grids: dict[bytes, list[int]]
    features: dict[bytes, torch.Tensor]


def new_cache(model: nn.Module) -> Cache:
    """Return an empty cache, as `generate` makes it when nothing else is asked for."""
    return empty_cache(model.config)


def joined_caches(rows: list[Cache], joined: Cache, copies: int) -> Cache:
    """Put the caches of single rows into an empty one, padded on the left to the longest, each row `copies` times over."""
    filled = next(cache for cache in rows if cache.get_seq_length())
    longest = max(cache.get_seq_length() for cache in rows)
    for index, layer in enumerate(filled.layers):
        states = []
        for which, like in enumerate(_states(layer)):
            _, heads, _, width = like.shape
            padded = like.new_zeros(len(rows), heads, longest, width)
            for row, cache in enumerate(rows):
                if length := cache.get_seq_length():
                    padded[row, :, longest - length :] = _states(cache.layers[index])[which][0]
            states.append(padded.repeat_interleave(copies, dim=0))
        joined.update(*states, index)
    return joined


def _states(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values (B, heads, N, width) of a layer."""
    return layer.states() if isinstance(layer, Int8Layer) else (layer.keys, layer.values)


def image_key(image, options: object) -> bytes:
    """Return what tells images apart: what they show and how they are to be cut.

    Args:
        image: A PIL image (what is shown of it counts), an array or tensor (their values), a path (the file's bytes), a URL
            or data URI (its text).
        options: Whatever else decides how it is cut; its `repr` counts.

    Raises:
        ValueError: Anything else, or an image whose file is broken.
    """
    digest = hashlib.sha256(repr(options).encode())
    if isinstance(image, (str, os.PathLike)):
        digest.update(repr(getattr(image, "page", None)).encode())
        _digest_source(digest, image)
    elif isinstance(image, torch.Tensor):
        digest.update(repr((image.shape, image.dtype)).encode())
        try:
            digest.update(image.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        except (TypeError, RuntimeError) as error:  # sparse, on the meta device, ...
            raise ValueError(f"A tensor of {image.layout} on {image.device} is no picture: {error}") from error
    elif isinstance(image, Image.Image):
        shown = to_rgb(image)
        digest.update(repr(shown.size).encode())
        digest.update(shown.tobytes())
    elif isinstance(image, np.ndarray):
        digest.update(repr((image.shape, image.dtype)).encode())
        digest.update(image.tobytes())
    else:
        raise ValueError(
            f"A picture is a PIL image, an array, a tensor, a path, a URL or a data URI, got {type(image).__name__}."
        )
    return digest.digest()


def _digest_source(digest, source: str | os.PathLike) -> None:
    """Take in the bytes of a file, else the text itself."""
    path = path_of(source)
    if path is None:
        digest.update(os.fsdecode(source).encode(errors="surrogatepass"))
        return
    check_file(path)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"{short_name(path)} cannot be read as a picture: {error}") from error


def _holds_everything(cache: Cache) -> bool:
    """Tell whether no layer has let go of old tokens, as sliding windows do when they are full."""
    return all(
        isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.shape[-2] == layer.get_seq_length()
        for layer in cache.layers
    )


def _weights_version(model: nn.Module) -> int:
    """Return what changes when a weight or buffer is replaced, moved or trained, an adapter or the configuration changed."""
    buffers = (
        buffer
        for module in model.modules()
        if not _rewrites_its_buffers(module)
        for buffer in module.buffers(recurse=False)
    )
    weights = tuple(
        (getattr(p, "_local_tensor", p).data_ptr(), p.dtype, p.device, 0 if p.is_inference() else p._version)
        for p in chain(model.parameters(), buffers)
    )
    adapters = tuple(  # of peft
        repr(
            (module.disable_adapters, module.active_adapters, module.merged_adapters, getattr(module, "scaling", None))
        )
        for module in model.modules()
        if isinstance(getattr(module, "merged_adapters", None), list)
    )
    return hash((weights, adapters, repr(model.config.to_dict())))


def _rewrites_its_buffers(module: nn.Module) -> bool:
    """Tell whether these are rotary frequencies that follow the prompt's length, which is harmless up to `cacheable_length`."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))


# For each model the memories that hold something, the most recent last, and those of lists of messages, which nobody else
# holds.
_holding_lock = threading.Lock()
_holding: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref]]" = weakref.WeakKeyDictionary()
_found_by_messages: "weakref.WeakKeyDictionary[nn.Module, list[PromptMemory]]" = weakref.WeakKeyDictionary()


def recall(
    model: nn.Module, memory: PromptMemory | None, beginning: list[tuple] | None, keeps_history: bool
) -> PromptMemory | None:
    """Return what a turn goes on from: the memory of its history, or of the messages that these begin with, or a fresh one.

    Args:
        memory: That of the history, which may be another model's.
        beginning: Of a list of messages what was said so far, the question last: a tuple for each, images by their keys.
        keeps_history: Whether the history of the turn is returned; without it a turn by itself needs no memory.
    """
    if beginning is None:
        is_ours = memory is not None and memory.belongs_to(model)
        return memory if is_ours else PromptMemory(model) if keeps_history else None
    with _holding_lock:
        known = [memory for memory in _found_by_messages.get(model, []) if memory.belongs_to(model)]
        shared = [common_length(memory._beginning, beginning) for memory in known]
        best = max(reversed(range(len(known))), key=lambda i: shared[i], default=None)
        # A system message alone is not a conversation.
        memory = known[best] if best is not None and shared[best] > 1 else PromptMemory(model)
        memory._beginning = list(beginning)
        _found_by_messages[model] = [*(other for other in known if other is not memory), memory]
    return memory


def forget_the_oldest(model: nn.Module, newest: PromptMemory | None = None) -> None:
    """Keep as many conversations, and bytes of them, as the model allows, `newest` before all others."""
    with _holding_lock:
        others = [memory for ref in _holding.get(model, []) if (memory := ref()) is not None and memory is not newest]
        holding = [*(memory for memory in others if memory.nbytes()), *([] if newest is None else [newest])]
        sizes = [memory.nbytes() for memory in holding]
        most = float("inf") if model.remembered_bytes is None else model.remembered_bytes
        while len(holding) > max(model.remembered_conversations, 0) or sum(sizes) > most:
            holding.pop(0).forget()
            sizes.pop(0)
        _holding[model] = [weakref.ref(memory) for memory in holding]
        _found_by_messages[model] = [memory for memory in _found_by_messages.get(model, []) if memory in holding]


def forget_all(model: nn.Module) -> None:
    """Free what is remembered of all conversations with a model."""
    with _holding_lock:
        for ref in _holding.pop(model, []):
            if (memory := ref()) is not None:
                memory.forget()
        _found_by_messages.pop(model, None)
