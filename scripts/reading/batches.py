"""Which pages are read together: by what they take in tokens, counted without their pixels.

    for batch in plan(documents, journal.done, settings, cost, max_batch_tokens=16384):
        pages = open_pages(batch, settings)

A batch costs its rows times its longest row, prompt and answer, since shorter rows are padded. Pages stay in the order of the
documents.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from minimonkey.scripts.reading.pages import Document, Settings, open_document


T = TypeVar("T")


@dataclass(frozen=True)
class Page:
    """A page to be read, or a page or a file (`page` None) that cannot be.

    `tokens` is what it costs, `image` its pixels once it is open.
    """

    file: str
    page: int | None
    tokens: int = 0
    error: str | None = None
    image: Image.Image | None = None


class _Opener:
    """Keeps the last document open, since pages come in the order of documents."""

    def __init__(self, settings: Settings):
        self.settings, self.stack, self.path = settings, ExitStack(), None

    def __enter__(self) -> "_Opener":
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def __call__(self, path: str) -> Any:
        if path != self.path:
            self.stack.close()
            self.path = None
            self.opened = self.stack.enter_context(open_document(Document(path), self.settings))
            self.path = path
        return self.opened


def plan(
    documents: Iterable[Document],
    done: Container[tuple[str, int | None]],
    settings: Settings,
    cost: Callable[[int, int], int],
    max_batch_tokens: int,
) -> Iterator[list[Page]]:
    """Yield batches of the pages that are not done, those that cannot be read among them; nothing is decoded.

    Args:
        cost: Tokens of a page of (width, height) pixels, prompt and answer.
        max_batch_tokens: Most tokens of a batch; a page that has more is a batch of its own.
    """
    batch, rows, longest = [], 0, 0
    with _Opener(settings) as opener:
        for page in _pages(documents, done, opener, cost):
            longest = max(longest, page.tokens)
            if rows and (rows + 1) * longest > max_batch_tokens:
                yield batch
                batch, rows, longest = [], 0, page.tokens
            batch.append(page)
            rows += page.error is None
    if batch:
        yield batch


def _pages(documents, done, opener: _Opener, cost) -> Iterator[Page]:
    for document in documents:
        if document.error is not None:
            if (document.path, None) not in done:
                yield Page(document.path, None, error=document.error)
            continue
        for number in document.pages:
            if (document.path, number) in done:
                continue
            try:
                yield Page(document.path, number, cost(*opener(document.path).size(number)))
            except ValueError as error:
                yield Page(document.path, number, error=str(error))


def open_pages(batch: list[Page], settings: Settings) -> list[Page]:
    """Return a batch with the images of its pages, or with the error of one that cannot be decoded."""
    pages = []
    with _Opener(settings) as opener:
        for page in batch:
            if page.error is None:
                try:
                    page = replace(page, image=opener(page.file).image(page.page))
                except ValueError as error:
                    page = replace(page, error=str(error))
            pages.append(page)
    return pages


def ahead(values: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator yields, of which one thread makes the next value while the last is worked on."""
    with ThreadPoolExecutor(1) as thread:
        end = object()
        coming = thread.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, values, end)
            yield value
