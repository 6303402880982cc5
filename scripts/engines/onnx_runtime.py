"""`minimonkey chat --engine onnx`: a MiniMonkey of ONNX files, all of it run by onnxruntime; torch cuts images and samples.

model = load_onnx(Path("nano-onnx"))
answer = model.chat(load_processor("nano-onnx"), "receipt.png", "What is the total?", use_scm=True)
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from minimonkey.compression import AttentionInputs
from minimonkey.scripts.engines.model import EngineModel
from minimonkey.scripts.exporting.gguf_language import longest_exact
from minimonkey.scripts.exporting.onnx_parts import DECODER, EMBEDDING, SCORER, VISION, cache_names
from minimonkey.scripts.importing.config import read_json
from minimonkey.scripts.repository import model_config


SETTINGS = "onnx_settings.json"


class OnnxDecoder:
    """The language model in onnxruntime, one sequence; see `libllama.LibLlama` for the methods."""

    needs_consecutive_positions = False

    def __init__(self, decoder, embedding, config):
        text = config.text_config
        self._decoder, self._embedding = decoder, embedding
        self.width, self.vocab_size, self.context_length = (
            text.hidden_size,
            text.vocab_size,
            longest_exact(config),
        )
        self._past, self._present = (
            cache_names(text.num_hidden_layers, name) for name in ("past_key_values", "present")
        )
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        empty = np.zeros((1, text.num_key_value_heads, 0, head_width), dtype=np.float32)
        self._cache = [empty for _ in self._past]

    @property
    def length(self) -> int:
        return self._cache[0].shape[2]

    def read(self, embeddings: np.ndarray, every: bool = False) -> np.ndarray:
        """Read embeddings (n, D); return the logits of the last one (1, vocabulary), or of `every` one (n, vocabulary)."""
        count = len(embeddings)
        if self.length + count > self.context_length:
            raise ValueError(
                f"{self.length} + {count} tokens are more than the {self.context_length} that it is right for."
            )
        wanted = np.arange(count) if every else np.array([count - 1])
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embeddings[None], dtype=np.float32),
            "position_ids": np.arange(self.length, self.length + count, dtype=np.int64)[None],
            "logits_of": wanted.astype(np.int64),
            **dict(zip(self._past, self._cache)),
        }
        logits, *self._cache = self._decoder.run(["logits", *self._present], inputs)
        return logits[0]

    def read_ids(self, ids: list[int], every: bool = False) -> np.ndarray:
        """Read token ids, see `read`."""
        return self.read(self._embedding.run(None, {"input_ids": np.array([ids], dtype=np.int64)})[0][0], every)

    def cut(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens."""
        if length < self.length:
            self._cache = [np.ascontiguousarray(states[:, :, :length]) for states in self._cache]


class _Embedding(nn.Module):
    def __init__(self, session):
        super().__init__()
        self.session = session

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"input_ids": input_ids.numpy()})[0])


class OnnxModel(EngineModel):
    """A MiniMonkey without weights in torch; see `load_onnx`."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config):
        with torch.device("meta"):
            super().__init__(config)
        nothing = nn.Identity()
        self.model.vision_tower, self.model.multi_modal_projector = nothing, nothing
        self.model.language_model.norm = nothing

    def open(self, folder: Path, options) -> "OnnxModel":
        """Open the files of `minimonkey export-onnx`; return this model.

        Args:
            options: onnxruntime's `SessionOptions`.

        Raises:
            ValueError: A file that is missing or damaged.
        """
        import onnxruntime

        self.settings = read_json(folder / SETTINGS)
        sessions = {}
        for name in (VISION, EMBEDDING, DECODER, SCORER):
            path = folder / f"{name}.onnx"
            if not path.is_file():
                raise ValueError(f"{folder} lacks {path.name}; `minimonkey export-onnx` writes it.")
            try:
                sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        self.vision, self.scorer = sessions[VISION], sessions[SCORER]
        self.model.language_model.embed_tokens = _Embedding(sessions[EMBEDDING])
        return self.use(OnnxDecoder(sessions[DECODER], sessions[EMBEDDING], self.config))

    def get_image_features(self, pixel_values, **kwargs):
        """Return the features (T, K, D) of tiles as `pooler_output`."""
        features = self.vision.run(None, {"pixel_values": pixel_values.float().numpy()})[0]
        return ModelOutput(pooler_output=torch.from_numpy(features))

    def scored_layers(self) -> int:
        """Return the number of layers up to the one that the scorer was exported for."""
        return self.settings["scm_layer"] + 1

    def _probe(self, layer: int, sequence: torch.Tensor, is_image: torch.Tensor) -> AttentionInputs:
        if layer != self.settings["scm_layer"]:
            raise ValueError(
                f"{SCORER}.onnx scores by layer {self.settings['scm_layer']}, not {layer}; leave out scm_layer."
            )
        query, key = self.scorer.run(None, {"inputs_embeds": sequence[None].float().numpy()})
        return AttentionInputs(torch.from_numpy(query), torch.from_numpy(key), self.settings["scorer_scaling"])


def load_onnx(folder: Path, threads: int | None = None) -> OnnxModel:
    """Load a folder that `minimonkey export-onnx` wrote.

    Args:
        threads: By default torch's.

    Raises:
        ValueError: onnxruntime is not installed, or files are missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f'ONNX files are run by onnxruntime: pip install "minimonkey[onnx]" ({error})') from error
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds no ONNX files of a MiniMonkey; `minimonkey export-onnx` writes them.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    model = OnnxModel(model_config(folder)).eval().open(folder, options)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
