"""llama.cpp by itself: language model and `--mmproj` file, one grid of tiles by its own rule, no MSAC and no SCM.

For comparing its answers with this package's; people use it through llama.cpp's own programs.
"""

import ctypes
from pathlib import Path

import numpy as np
from PIL import Image

from minimonkey.scripts.engines.libllama import LibLlama, require_libllama, say_nothing


IMAGE = 1  # mtmd's number for a chunk of image tokens


def require_mtmd():
    """Return llama-cpp-python's module for llama.cpp's multimodal library; raise `ValueError` where it is not installed."""
    try:
        from llama_cpp import mtmd_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"llama.cpp's multimodal library comes with llama-cpp-python: pip install it ({error})"
        ) from error
    silence = say_nothing(require_libllama())
    mtmd_cpp.mtmd_log_set(silence, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(silence, ctypes.c_void_p(0))
    return mtmd_cpp


class PlainLlamaCpp:
    """Answers questions about one image as llama.cpp's own programs do, greedily.

    Args:
        language: The loaded GGUF file.
        mmproj: The file of `minimonkey export-gguf --mmproj`.

    Raises:
        ValueError: The library is missing, or cannot load the file.
    """

    def __init__(self, language: LibLlama, mmproj: Path, threads: int):
        self._c, self.language = require_mtmd(), language
        options = self._c.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.warmup, options.n_threads = False, False, False, threads
        self._context = self._c.mtmd_init_from_file(str(mmproj).encode(), language.model, options)
        if not self._context:
            raise ValueError(f"llama.cpp cannot load {mmproj}; `minimonkey export-gguf --mmproj` writes it.")

    def close(self) -> None:
        """Free the vision part; the language model stays."""
        self._c.mtmd_free(self._context)

    def chunks(self, image: Image.Image, prompt: str) -> list[list[int] | np.ndarray]:
        """Return a prompt in the parts that llama.cpp reads: token ids, and embeddings (n, D) of image tokens.

        Args:
            prompt: The whole, rendered; `<__media__>` stands for the image.
        """
        pixels = np.ascontiguousarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = self._c.mtmd_bitmap_init(width, height, data)
        chunks = self._c.mtmd_input_chunks_init()
        text = prompt.encode()
        status = self._c.mtmd_tokenize(
            self._context,
            chunks,
            ctypes.byref(self._c.mtmd_input_text(text, len(text), True, True)),
            (ctypes.c_void_p * 1)(bitmap),
            1,
        )
        try:
            if status:
                raise RuntimeError(f"llama.cpp could not read the prompt (status {status}).")
            return [
                self._read(self._c.mtmd_input_chunks_get(chunks, i))
                for i in range(self._c.mtmd_input_chunks_size(chunks))
            ]
        finally:
            self._c.mtmd_input_chunks_free(chunks)
            self._c.mtmd_bitmap_free(bitmap)

    def _read(self, chunk) -> list[int] | np.ndarray:
        if self._c.mtmd_input_chunk_get_type(chunk) != IMAGE:
            count = ctypes.c_size_t()
            ids = self._c.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            return [ids[i] for i in range(count.value)]
        if self._c.mtmd_encode_chunk(self._context, chunk):
            raise RuntimeError("llama.cpp could not encode the image.")
        shape = (self._c.mtmd_input_chunk_get_n_tokens(chunk), self.language.width)
        return np.ctypeslib.as_array(self._c.mtmd_get_output_embd(self._context), shape=shape).copy()

    def answer(self, image: Image.Image, prompt: str, end_ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the token ids of the answer to a prompt, see `chunks`, without the one that ends it."""
        self.language.cut(0)
        for part in self.chunks(image, prompt):
            read = self.language.read_ids if isinstance(part, list) else self.language.read
            logits = read(part)
        ids: list[int] = []
        while len(ids) < max_new_tokens and (index := int(logits[-1].argmax())) not in end_ids:
            ids.append(index)
            logits = self.language.read_ids([index])
        return ids
