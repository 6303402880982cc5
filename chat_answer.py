"""What `chat` returns: answers with their confidence, histories that remember, answers that arrive piece by piece.

Deals with text and token ids, not with prompts or models.

    for text in model.chat(processor, "page.png", "Read the text.", stream=True):
        print(text, end="")
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from .conversation import write_messages
from .image_processing_minimonkey import list_images
from .processing_minimonkey import list_videos
from .prompt_memory import PromptMemory


class ChatHistory(list):
    """The (question, answer) pairs of a conversation, a list like any other, that remembers what was computed for it.

    The next `chat` that gets it computes only what is new. After an edit it still serves as far as it is unchanged; a copy or a
    pickled one is a plain list, whose conversation is computed from the start.
    """

    memory: PromptMemory | None = None

    def to_messages(self, images=None, videos=None, system_message: str | None = None) -> list[dict[str, Any]]:
        """Return the turns as messages in the form of transformers, which `chat(messages=...)` takes.

        Args:
            images, videos: Those of the conversation, as passed to `chat`; each is put where its placeholder stands.

        Raises:
            ValueError: The numbers of placeholders and of images or videos differ.
        """
        return write_messages(self, list_images(images), list_videos(videos), system_message)

    def forget(self) -> None:
        """Free the memory that the conversation holds (its key/value cache and the features of its images)."""
        if self.memory is not None:
            self.memory.forget()

    def __reduce_ex__(self, protocol):
        return list, (list(self),)


@dataclass
class ChatAnswer:
    """An answer and what is known about it, see `return_dict=True` of `chat`.

    `token_ids` are those that were generated, including the end token, and `log_probabilities` those that the model gave
    each of them, before temperature and other settings of sampling. `finish_reason` is "stop" (it ended by itself or at a stop
    string), "length" (at the limit of tokens), "repetition" (see `stop_repetition`), or None where it was ended from outside.
    """

    text: str
    history: ChatHistory
    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] | None = None
    finish_reason: str | None = None

    @property
    def confidence(self) -> float | None:
        """The geometric mean of the tokens' probabilities, 0 to 1."""
        if not self.log_probabilities:
            return None
        return math.exp(sum(self.log_probabilities) / len(self.log_probabilities))


class TokenProbabilities(LogitsProcessor):
    """Records the log-probability of each token that a generation chose, one sequence a row; changes no scores.

    Beside the result, the probabilities of one step (B, vocabulary) are kept.
    """

    def __init__(self):
        self._step: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._step is not None:
            self._chosen.append(self._step.gather(1, input_ids[:, -1:]))
        self._step = scores.float().log_softmax(dim=-1)
        return scores

    def of(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities (B, new tokens) of the new tokens of `sequences` (B, all tokens)."""
        return torch.cat([*self._chosen, self._step.gather(1, sequences[:, -1:])], dim=1)


def trim_pieces(pieces: Iterator[str], ends: list[str]) -> Iterator[str]:
    """Yield the text before the first of `ends`, without white space around it, as early as it is certain."""
    held, has_begun = "", False
    for piece in pieces:
        held += piece
        if any(end in held for end in ends):
            break
        certain = held[: len(held) - max((_overlap(held, end) for end in ends), default=0)].rstrip()
        if certain:
            yield certain if has_begun else certain.lstrip()
            held, has_begun = held[len(certain) :], True
    for end in ends:
        held = held.partition(end)[0]
    rest = held.rstrip()
    rest = rest if has_begun else rest.lstrip()
    if rest:
        yield rest


def _overlap(text: str, end: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of `end`."""
    return next((n for n in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:n])), 0)


class _TokenQueue:
    """Hands the new tokens of a generation from its thread to another."""

    def __init__(self):
        self.queue: queue.Queue[int | None] = queue.Queue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.queue.put(int(value.flatten()[0]))  # of several returned sequences the first is the answer
        self._is_prompt = False

    def end(self) -> None:
        self.queue.put(None)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _generate(run, tokens: _TokenQueue, stop: _StopWhen, outcome: dict[str, Any]) -> None:
    try:
        outcome["answer"] = run(tokens, stop)
    except BaseException as error:  # raised again where the answer is read
        outcome["error"] = error
    finally:
        tokens.end()


def _growing_text(tokens: _TokenQueue, decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield what each new token adds to the decoded text; characters of several tokens wait until they are whole."""
    ids, given = [], ""
    for token in iter(tokens.queue.get, None):
        ids.append(token)
        text = decode(ids)
        if text.startswith(given) and not text.endswith("\ufffd"):
            yield text[len(given) :]
            given = text
    yield decode(ids)[len(given) :]


class AnswerStream:
    """The pieces of an answer while it is made; joined they are the whole answer, and `text` is what there is so far. Iterate
    over it once.

    Afterwards `answer` and `history` are available. `close()`, or leaving a `with` block, ends the generation early; the answer
    is then what was made so far.

    Args:
        run: Generates, given a streamer and a stopping criterion, and returns the whole answer.
        decode: Turns token ids into their text.
        ends: Texts that end the answer.
    """

    def __init__(
        self,
        run: Callable[[_TokenQueue, StoppingCriteria], ChatAnswer],
        decode: Callable[[list[int]], str],
        ends: list[str],
    ):
        self.text = ""  # so far
        tokens, self._stop, self._outcome = _TokenQueue(), threading.Event(), {}
        self._pieces = trim_pieces(_growing_text(tokens, decode), ends)
        # The thread knows nothing of this object, so that an abandoned stream is deleted, which ends the generation.
        arguments = (run, tokens, _StopWhen(self._stop), self._outcome)
        self._thread = threading.Thread(target=_generate, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        for piece in self._pieces:
            self.text += piece
            return piece
        _ = self.result  # raises what went wrong
        raise StopIteration

    @property
    def result(self) -> ChatAnswer:
        """The whole answer; waits until it is complete."""
        self._thread.join()
        if "error" in self._outcome:
            raise self._outcome["error"]
        return self._outcome["answer"]

    @property
    def answer(self) -> str:
        return self.result.text

    @property
    def history(self) -> ChatHistory:
        return self.result.history

    def close(self) -> None:
        """End the generation with the next token, if it is still under way."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        self._stop.set()
