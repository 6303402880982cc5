"""A language model in a GGUF file, run by llama.cpp's library through llama-cpp-python.

Reads embeddings or token ids, one sequence, and gives logits; knows nothing of images. Threads must not use one object at once.
"""

import ctypes
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np


BATCH = 512  # tokens that llama.cpp reads at a time


def require_libllama():
    """Return the module `llama_cpp`, whose functions are those of libllama; raise `ValueError` where it is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its library does not fit this system
        raise ValueError(
            f'llama.cpp is used through llama-cpp-python: pip install "minimonkey[gguf]" or llama-cpp-python ({error})'
        ) from error
    llama_cpp.llama_log_set(say_nothing(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


@lru_cache  # kept: libllama calls it as long as the process lives
def say_nothing(llama_cpp):
    """Return a callback for what llama.cpp's libraries log, which goes nowhere."""
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _free(llama_cpp, model, context, batches) -> None:
    for batch in batches:
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


class LibLlama:
    """One sequence in llama.cpp: `read` goes on from what was read, `cut` takes the end of it back, `close` frees it all.

    Args:
        path: A GGUF file, as `minimonkey export-gguf` writes it.
        context_length: The most tokens of prompt and answer together.
        threads: How many compute.

    Raises:
        ValueError: There is no such file, or llama.cpp cannot load it.
    """

    needs_consecutive_positions = True

    def __init__(self, path: Path, context_length: int, threads: int):
        self._c = require_libllama()
        if not path.is_file():
            raise ValueError(f"There is no file {path}; `minimonkey export-gguf` writes it.")
        parameters = self._c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self._c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}: it is no GGUF file of a language model, or is damaged.")
        options = self._c.llama_context_default_params()
        options.n_ctx = context_length
        options.n_batch = options.n_ubatch = min(BATCH, context_length)
        options.n_threads = options.n_threads_batch = threads
        self._context = self._c.llama_init_from_model(self.model, options)
        if not self._context:
            self._c.llama_model_free(self.model)
            raise ValueError(f"llama.cpp cannot make a context of {context_length} tokens; take a smaller --context.")
        self.context_length = context_length
        self.length = 0  # tokens that it holds
        self.width = self._c.llama_model_n_embd(self.model)
        self.layers = self._c.llama_model_n_layer(self.model)
        self.vocab_size = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self.model))
        self._batch_size = min(BATCH, context_length)
        self._of_ids = self._c.llama_batch_init(self._batch_size, 0, 1)
        self._of_embeddings = self._c.llama_batch_init(self._batch_size, self.width, 1)
        # Frees weights and cache; at the latest when Python ends, before its modules go.
        batches = (self._of_ids, self._of_embeddings)
        self.close = weakref.finalize(self, _free, self._c, self.model, self._context, batches)

    def read(self, embeddings: np.ndarray, every: bool = False) -> np.ndarray:
        """Read embeddings (n, width) and return the logits of the last one (1, vocabulary), or of `every` one (n, vocabulary).

        Raises:
            ValueError: They do not fit into the context.
        """
        parts = np.ascontiguousarray(embeddings, dtype=np.float32)
        return self._read(
            len(parts), every, self._of_embeddings, lambda first, stop: self._put_embeddings(parts[first:stop])
        )

    def read_ids(self, ids: list[int], every: bool = False) -> np.ndarray:
        """Read token ids and return logits, see `read`."""
        return self._read(len(ids), every, self._of_ids, lambda first, stop: self._put_ids(ids[first:stop]))

    def cut(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens."""
        if length < self.length:
            self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), 0, length, -1)
            self.length = length

    def _put_ids(self, ids: list[int]) -> None:
        for place, index in enumerate(ids):
            self._of_ids.token[place] = index

    def _put_embeddings(self, embeddings: np.ndarray) -> None:
        ctypes.memmove(self._of_embeddings.embd, embeddings.ctypes.data, embeddings.nbytes)

    def _read(self, count: int, every: bool, batch, put) -> np.ndarray:
        if self.length + count > self.context_length:
            raise ValueError(
                f"{self.length} + {count} tokens do not fit into llama.cpp's context of {self.context_length}; load it with a "
                "larger one (--context)."
            )
        logits = []
        for first in range(0, count, self._batch_size):
            stop = min(first + self._batch_size, count)
            put(first, stop)
            batch.n_tokens = stop - first
            for place in range(stop - first):
                batch.pos[place] = self.length + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = every or first + place == count - 1
            status = self._c.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(
                    f"llama.cpp could not read {stop - first} tokens behind {self.length} (status {status})."
                )
            wanted = range(stop - first) if every else [stop - first - 1] if stop == count else []
            for place in wanted:
                values = self._c.llama_get_logits_ith(self._context, place)
                logits.append(np.ctypeslib.as_array(values, shape=(self.vocab_size,)).copy())
            self.length += stop - first
        return np.stack(logits)
