"""`minimonkey chat --engine llama.cpp`: a MiniMonkey whose language model llama.cpp runs.

model = load_llama_cpp("MiniMonkey-2B", Path("2b-q8.gguf"), torch.bfloat16)
answer = model.chat(processor, "receipt.png", "What is the total?")
"""

from pathlib import Path

import torch

from minimonkey.scripts.engines.libllama import LibLlama, require_libllama
from minimonkey.scripts.engines.model import EngineModel
from minimonkey.scripts.exporting.gguf_file import require_gguf
from minimonkey.scripts.exporting.gguf_language import check_language_model, longest_exact
from minimonkey.scripts.repository import model_config, readable


CONTEXT_LENGTH = 8192
# Two checkpoints that were trained differ in the last norm; one that was loaded in 16 bits differs from itself by 2 ** -9.
SAME = 2**-7


def load_llama_cpp(
    source: str | Path,
    gguf: Path,
    dtype: torch.dtype,
    subfolder: str = "",
    use_scm: bool = False,
    context_length: int | None = None,
    threads: int | None = None,
) -> EngineModel:
    """Load what torch has of a model, and its language model from a GGUF file.

    Args:
        source: Hub id or folder of the MiniMonkey that the file was exported from.
        use_scm: Whether to load the layers that score tokens for scale compression.
        context_length: The most tokens of prompt and answer; by default 8192, or less where llama.cpp would compute others.
        threads: By default torch's.

    Raises:
        ValueError: A package that is missing, a file that does not belong to the model, a context that is too long.
    """
    require_libllama()
    reader = require_gguf().GGUFReader
    if not gguf.is_file():
        raise ValueError(f"There is no file {gguf}; `minimonkey export-gguf` writes it.")
    config = model_config(source, subfolder)
    check_language_model(config)
    longest = longest_exact(config)
    if context_length is not None and context_length > longest:
        raise ValueError(
            f"llama.cpp computes this language model right up to {longest} tokens, not {context_length}: take fewer."
        )
    try:
        tensors = {tensor.name: tensor for tensor in reader(gguf).tensors}
    except ValueError as error:
        raise ValueError(f"{gguf} is no GGUF file, or is damaged: {error}") from error
    with readable(source):
        model = EngineModel.from_pretrained(
            source, subfolder=subfolder, dtype=dtype, scored_layers=config.scm_layer + 1 if use_scm else 0
        ).eval()
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    norm, theirs = model.model.language_model.norm.weight.float(), tensors.get("output_norm.weight")
    if (
        theirs is None
        or len(layers) != config.text_config.num_hidden_layers
        or len(theirs.data) != len(norm)
        or not torch.allclose(torch.tensor(theirs.data), norm, rtol=SAME, atol=SAME)
    ):
        raise ValueError(f"{gguf} was not exported from {source}: their weights differ.")
    length = min(CONTEXT_LENGTH, longest) if context_length is None else context_length
    return model.use(LibLlama(gguf, length, threads or torch.get_num_threads()))
