"""Pages in, lines out: what a result says of each page, and of each that failed.

    lines = Reader(engine, Question("Read the text.")).read(open_pages(batch, settings))

A batch that fails is read again in halves, down to the page that fails, whose line says why.
"""

import json
import math
import time
from dataclasses import replace
from typing import Any

from minimonkey.chat_answer import ChatAnswer
from minimonkey.scripts.reading.batches import Page
from minimonkey.scripts.reading.confidence import token_spans, value_confidences, word_confidences
from minimonkey.scripts.reading.engines import Engine, Question


class Reader:
    """Asks an engine and writes down its answers.

    Args:
        question: What each page is asked; with a schema the answer is JSON.
        field_questions: Instead, a question for each field by its name, whose answers are texts.
        retry_images_kwargs: Options of the image processor with which a page is asked once more whose answer repeated itself;
            None: it is not.
        with_words: Whether lines have the confidence of each word.
    """

    def __init__(
        self,
        engine: Engine,
        question: Question,
        field_questions: dict[str, str] | None = None,
        retry_images_kwargs: dict[str, Any] | None = None,
        with_words: bool = False,
    ):
        self.engine, self.question, self.with_words = engine, question, with_words
        self.field_questions, self.retry_images_kwargs = field_questions, retry_images_kwargs

    def read(self, pages: list[Page]) -> list[dict[str, Any]]:
        """Return one line for each page, in order.

        A line has the `file`, the number of the `page` (from 1; None for a file as a whole), and either an `error`, or
        `answer`, `confidence`, `finish_reason`, `tokens` (of the answer), `image_tokens` and `seconds` (its share of the
        batch); `words` and their confidence, or `fields` and the `field_confidence` of each value by its path; `retried`, if it
        was asked twice.
        """
        started = time.perf_counter()
        opened = [page for page in pages if page.error is None]
        if self.field_questions is None:
            said = [self._described(*one) for one in self._ask(opened, self.question)]
        else:
            by_field = [self._ask(opened, replace(self.question, text=text)) for text in self.field_questions.values()]
            said = [self._joined(answers) for answers in zip(*by_field)]
        seconds = round((time.perf_counter() - started) / max(len(opened), 1), 4)
        coming, lines = iter(said), []
        for page in pages:
            line = {"file": page.file, "page": page.page}
            if page.error is not None:
                lines.append(line | {"error": page.error})
                continue
            what = next(coming)
            if "error" not in what:
                tokens = self.engine.count_tokens(*page.image.size, self.question)
                what = what | {"image_tokens": tokens, "seconds": seconds}
            lines.append(line | what)
        return lines

    def _ask(self, pages: list[Page], question: Question) -> list[tuple[ChatAnswer | str, bool]]:
        """Return for each page the answer, or what went wrong with it, and whether it was asked twice."""
        answers = self._answer(pages, question) if pages else []
        looped = [
            i for i, one in enumerate(answers) if isinstance(one, ChatAnswer) and one.finish_reason == "repetition"
        ]
        if self.retry_images_kwargs is None or not looped:
            return [(answer, False) for answer in answers]
        again = self._answer([pages[i] for i in looped], replace(question, images_kwargs=self.retry_images_kwargs))
        better = {
            i: one for i, one in zip(looped, again) if isinstance(one, ChatAnswer) and one.finish_reason != "repetition"
        }
        return [(better.get(i, answer), i in looped) for i, answer in enumerate(answers)]

    def _answer(self, pages: list[Page], question: Question) -> list[ChatAnswer | str]:
        """Return the answer for each page, or the message of what went wrong with it."""
        try:
            return self.engine.answer([page.image for page in pages], question)
        except (ValueError, RuntimeError, MemoryError) as error:
            if len(pages) == 1:
                return [" ".join(str(error).split()) or type(error).__name__]
        half = len(pages) // 2  # outside the handler, which holds on to what the failed batch took
        return self._answer(pages[:half], question) + self._answer(pages[half:], question)

    def _described(self, answer: ChatAnswer | str, retried: bool) -> dict[str, Any]:
        if isinstance(answer, str):
            return {"error": answer}
        confidence = answer.confidence
        line = {
            "answer": answer.text,
            "confidence": None if confidence is None else round(confidence, 4),
            "finish_reason": answer.finish_reason,
            "tokens": len(answer.token_ids),
        } | ({"retried": True} if retried else {})
        if answer.log_probabilities is None or not (self.with_words or self.question.schema is not None):
            return line
        text, spans = token_spans(self.engine.tokenizer, answer.token_ids)
        if self.question.schema is None:
            return line | {"words": word_confidences(text, spans, answer.log_probabilities)}
        try:
            fields = json.loads(text)
        except ValueError:  # it ended before the last field
            return line | {"fields": None, "field_confidence": None}
        return line | {"fields": fields, "field_confidence": value_confidences(text, spans, answer.log_probabilities)}

    def _joined(self, answers: tuple[tuple[ChatAnswer | str, bool], ...]) -> dict[str, Any]:
        """Describe the answers to the questions for the fields of one page as one answer."""
        lines = {name: self._described(*answer) for name, answer in zip(self.field_questions, answers)}
        errors = [line["error"] for line in lines.values() if "error" in line]
        if errors:
            return {"error": errors[0]}
        fields = {name: line["answer"] for name, line in lines.items()}
        own = {name: answer.log_probabilities for name, (answer, _) in zip(lines, answers)}
        known = [value for values in own.values() for value in values or []]
        reasons = [line["finish_reason"] for line in lines.values()]
        retried = any(line.get("retried") for line in lines.values())
        return {
            "answer": json.dumps(fields, ensure_ascii=False),
            "confidence": round(math.exp(sum(known) / len(known)), 4) if known else None,
            "finish_reason": next((reason for reason in ("repetition", "length") if reason in reasons), "stop"),
            "tokens": sum(line["tokens"] for line in lines.values()),
            "fields": fields,
            "field_confidence": {name: round(math.exp(sum(values or [])), 4) for name, values in own.items()},
        } | ({"retried": True} if retried else {})
