"""What answers a batch of pages: transformers, or vLLM; both are asked and answer alike.

    engine = TransformersEngine(Weights(model="MiniMonkey-2B"))         or ENGINES[name](weights, questions)
    answers = engine.answer(images, Question("Read the text."))

An engine has a `tokenizer`, counts the tokens of a page's prompt without its pixels, and gives a `ChatAnswer` for each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import LogitsProcessorList

from minimonkey.chat_answer import ChatAnswer, ChatHistory
from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.conversation import get_template
from minimonkey.repetition import DEFAULTS, RepetitionGuard
from minimonkey.scripts.precision import choose_dtype
from minimonkey.scripts.reading.fields import Schema
from minimonkey.scripts.repository import load_model, load_processor, prepared
from minimonkey.scripts.serving.vllm_plugin import ARCHITECTURE


SYSTEM_TOKENS = 96  # enough for the system message and the control tokens of the templates
VLLM_BATCHED_TOKENS = 8192  # in one step of vLLM
# By default it would take most of the memory of the machine for its cache.
VLLM_ON_CPU = {"enforce_eager": True, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**30}


@dataclass(frozen=True)
class Weights:
    """Which model, and how it is loaded.

    Args:
        model: Hub id or folder.
        device: None: a GPU where there is one.
        dtype: As in precision.py; "auto" is what the device is fast in.
    """

    model: str
    subfolder: str = ""
    device: str | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class Question:
    """What each page is asked.

    Args:
        images_kwargs: Options of the image processor.
        schema: A JSON schema of an object that the answer must fulfil.
        stop_repetition: Whether an answer that repeats itself is ended.
        scm_keep_ratio: Share of the detailed tokens that scale compression keeps; None: no compression.
    """

    text: str
    max_new_tokens: int = 1024
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] | None = None
    stop_repetition: bool = True
    scm_keep_ratio: float | None = None


class Engine(Protocol):
    """What `Reader` needs of an engine."""

    tokenizer: Any

    def count_tokens(self, width: int, height: int, question: Question) -> int:
        """Count the image tokens of the prompt for an image of this size, before compression."""
        ...

    def answer(self, images: list[Image.Image], question: Question) -> list[ChatAnswer]:
        """Answer the question about each image, greedily.

        Raises:
            ValueError: A page or the question cannot be worked on.
            RuntimeError: The device failed, for want of memory for example.
        """
        ...


class TransformersEngine:
    """The model in this process; the vision tower runs once over all tiles of a batch.

    Args:
        questions: What will be asked; other engines have to know.
    """

    def __init__(self, weights: Weights, questions: Sequence[Question] = ()):
        device = weights.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = load_processor(weights.model)
        dtype = choose_dtype(weights.dtype, device)
        self.model = prepared(load_model(weights.model, subfolder=weights.subfolder, dtype=dtype).to(device))
        self.tokenizer = self.processor.tokenizer
        self._schema: Schema | None = None

    def count_tokens(self, width: int, height: int, question: Question) -> int:
        return count_image_tokens(self.processor, width, height, question)

    def answer(self, images: list[Image.Image], question: Question) -> list[ChatAnswer]:
        options: dict[str, Any] = {}
        if question.schema is not None:
            options["logits_processor"] = LogitsProcessorList([self._hold(question.schema, len(images))])
        if question.scm_keep_ratio is not None:
            options |= {"use_scm": True, "scm_keep_ratio": question.scm_keep_ratio}
        return self.model.batch_chat(
            self.processor,
            images,
            [question.text] * len(images),
            return_dict=True,
            do_sample=False,
            max_new_tokens=question.max_new_tokens,
            images_kwargs=question.images_kwargs,
            stop_repetition=question.stop_repetition,
            **options,
        )

    def _hold(self, schema: dict[str, Any], rows: int):
        if self._schema is None or self._schema.schema != schema:
            self._schema = Schema(schema)
        config = self.model.config
        end = self.tokenizer.convert_tokens_to_ids(get_template(config.template).separator)
        return self._schema.processor(self.tokenizer, config.text_config.vocab_size, end, rows)


class VllmEngine:
    """vLLM in this process, over `LLM.chat`; it batches by itself whatever it is given.

    It loads the code of the model's folder (`trust_remote_code`). Scale compression scores with the image alone there
    (`scm_queries="visual"`), and needs the plugin in serving/vllm_plugin.py, which vLLM finds where this package is installed.

    Args:
        questions: What will be asked, for which there is to be room.
        options: What `vllm.LLM` takes: gpu_memory_utilization, enforce_eager, ...

    Raises:
        ValueError: vLLM is not installed, or the weights are in a subfolder.
    """

    def __init__(self, weights: Weights, questions: Sequence[Question] = (), **options: Any):
        try:
            import vllm
            from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
        except ImportError as error:
            raise ValueError(f"--engine vllm needs vLLM ({error}); see docs/serving.md.") from error
        if weights.subfolder:
            raise ValueError(
                f"vLLM takes a folder of its own, not the subfolder {weights.subfolder!r}; put its weights and configuration "
                "beside the code and the tokenizer."
            )
        self.processor = load_processor(weights.model)
        self.tokenizer = self.processor.tokenizer
        self._sampling, self._structured, self._repetition = (
            vllm.SamplingParams,
            StructuredOutputsParams,
            RepetitionDetectionParams,
        )
        has_gpu = torch.cuda.is_available()
        dtype = str(choose_dtype(weights.dtype, "cuda" if has_gpu else "cpu")).removeprefix("torch.")
        given = {"trust_remote_code": True, "dtype": dtype, "limit_mm_per_prompt": {"image": 1}}
        given |= {} if has_gpu else VLLM_ON_CPU
        given |= _room(self.processor, weights.model, questions) | options
        self.llm = vllm.LLM(model=weights.model, **given)
        self.has_scm = ARCHITECTURE in vllm.ModelRegistry.get_supported_archs()

    def count_tokens(self, width: int, height: int, question: Question) -> int:
        return count_image_tokens(self.processor, width, height, question)

    def answer(self, images: list[Image.Image], question: Question) -> list[ChatAnswer]:
        guard = RepetitionGuard(0, decode=self.tokenizer.decode) if question.stop_repetition else None
        outputs = self._ask(images, question, 1 if guard is not None else None)
        if guard is not None:
            # vLLM knows no letters: what it took for a loop may be a rule or a column of numbers, which may be longer.
            early = [
                row
                for row, one in enumerate(outputs)
                if one.finish_reason == "repetition" and not guard.find(one.token_ids)
            ]
            again = self._ask([images[row] for row in early], question, guard.patience) if early else []
            for row, output in zip(early, again):
                outputs[row] = output
        return [self._read(output, question, guard) for output in outputs]

    def _ask(self, images: list[Image.Image], question: Question, patience: int | None) -> list:
        """Return vLLM's outputs, ended at runs that are `patience` times as long as the guard's; None: they are not."""
        options: dict[str, Any] = {}
        if question.schema is not None:
            options["structured_outputs"] = self._structured(json=question.schema)
        if patience is not None:
            # The guard asks for min_tokens: here several times a short period is one period.
            shortest = -(-DEFAULTS["min_tokens"] // DEFAULTS["min_repeats"])
            longest, count = DEFAULTS["max_period"], DEFAULTS["min_repeats"] * patience
            options["repetition_detection"] = self._repetition(
                min_pattern_size=shortest, max_pattern_size=longest, min_count=count
            )
        images_kwargs = dict(question.images_kwargs)
        if question.scm_keep_ratio is not None:
            if not self.has_scm:
                raise ValueError(
                    "vLLM did not find this package's plugin, which brings scale compression: install the package beside "
                    "vLLM and leave VLLM_PLUGINS alone, or leave out --use-scm."
                )
            images_kwargs |= {"use_scm": True, "scm_keep_ratio": question.scm_keep_ratio}
        sampling = self._sampling(temperature=0.0, max_tokens=question.max_new_tokens, logprobs=0, **options)
        text = {"type": "text", "text": question.text}
        messages = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": image}, text]}] for image in images
        ]
        outputs = self.llm.chat(messages, sampling, use_tqdm=False, mm_processor_kwargs=images_kwargs or None)
        return [output.outputs[0] for output in outputs]

    def _read(self, output, question: Question, guard: RepetitionGuard | None) -> ChatAnswer:
        ids, reason, text = list(output.token_ids), output.finish_reason, output.text
        probabilities = [step[token].logprob for token, step in zip(ids, output.logprobs or [])]
        end = None if guard is None else guard.find(ids)
        if end is not None:
            ids, reason = ids[:end], "repetition"
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        history = ChatHistory([(question.text, text.strip())])
        return ChatAnswer(text.strip(), history, ids, probabilities[: len(ids)] or None, reason)


def _room(processor, model: str, questions: Sequence[Question]) -> dict[str, int]:
    """Return how long prompt and answer get at most, so that vLLM reserves no less, and no more than the model can take."""
    if not questions:
        return {}
    longest = 0
    for question in questions:
        height, width = processor.image_processor.largest_image(**question.images_kwargs)
        longest = max(longest, count_page_tokens(processor, width, height, question))
    most = MiniMonkeyConfig.from_pretrained(model).text_config.max_position_embeddings
    return {"max_model_len": min(longest, most), "max_num_batched_tokens": max(longest, VLLM_BATCHED_TOKENS)}


def count_image_tokens(processor, width: int, height: int, question: Question) -> int:
    """Count the image tokens of an image of this size, before compression."""
    tiles = processor.image_processor.get_number_of_image_patches(height, width, question.images_kwargs)
    return tiles * processor.image_seq_length


def count_page_tokens(processor, width: int, height: int, question: Question) -> int:
    """Count what a page of this size takes in a batch at most: its image, the question, and the longest answer."""
    text = len(processor.tokenizer(question.text, add_special_tokens=False)["input_ids"]) + SYSTEM_TOKENS
    return count_image_tokens(processor, width, height, question) + text + question.max_new_tokens


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine}
