"""Prompts: the published chat templates as data, and the one way from the turns of a conversation to token ids.

    turns = [("<image>\nWhat is this?", None)]
    render(tokenizer, get_template("internlm2-chat"), turns, tiles=[3], tokens_per_tile=256).token_ids

Deals with strings and tokenizers, not with images or models. `chat`, `batch_chat` and training render; the jinja file that
`apply_chat_template` needs is made from the same data, and gives the same ids.

Text of a user must never act as a control token. `protect` marks every control-token spelling inside such text, which is
then encoded with tokens only for the spellings that the template itself wrote.

Source: the published `conversation.py` of InternVL2, InternVL2.5 and Mini-Monkey (MPT style), and the chat template of
transformers' InternVL checkpoints.
"""

import json
import re
import secrets
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer


IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
SLICES_START, SLICES_END = "<slice>", "</slice>"  # text, where a tokenizer has no such tokens
# In the order of their ids in the published tokenizers, where they follow the vocabulary of the language model.
GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_TOKEN, *GROUNDING_TOKENS)

DEFAULT_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


INTERNVL2_5_SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class ChatTemplate:
    """How the turns of one language-model family are written; a turn is header + text + separator + gap."""

    system_header: str
    user_header: str
    assistant_header: str
    separator: str
    """Ends every turn and is the end token of an answer."""
    gap: str = ""
    system_message: str | None = DEFAULT_SYSTEM_MESSAGE
    """What the system turn says by default; None: there is no such turn."""


_CHATML_HEADERS = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
_INTERNVL2 = ChatTemplate(*_CHATML_HEADERS, "<|im_end|>")
TEMPLATES: dict[str, ChatTemplate] = {
    "internlm2-chat": _INTERNVL2,
    "Hermes-2": _INTERNVL2,
    "phi3-chat": ChatTemplate("<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
    "internvl2_5": ChatTemplate(*_CHATML_HEADERS, "<|im_end|>", "\n", INTERNVL2_5_SYSTEM_MESSAGE),
    # of transformers' own InternVL checkpoints (InternVL3-1B-hf)
    "chatml": ChatTemplate(*_CHATML_HEADERS, "<|im_end|>", "\n", None),
}


def get_template(name: str) -> ChatTemplate:
    """Return the template called `name`.

    Raises:
        ValueError: No template has that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"Unknown chat template {name!r}; known are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def check_history(history: list[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """Check a history and return a fresh list of its (question, answer) pairs.

    Raises:
        ValueError: `history` is anything else, or a text of it holds a lone surrogate.
    """
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"`history` is a list of (question, answer) pairs, got {type(history).__name__}.")
    pairs = []
    for turn in history or []:
        is_pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"`history` is a list of (question, answer) pairs of strings, but one turn is {turn!r}.")
        pairs.append(tuple(check_text(text, "`history`") for text in turn))
    return pairs


def _system_part(template: ChatTemplate, system_message: str | None) -> str:
    """Return the system turn; there is none where neither `system_message` nor the template says anything."""
    message = template.system_message if system_message is None else system_message
    return "" if message is None else template.system_header + message + template.separator + template.gap


def chat_template_jinja(template: ChatTemplate, system_message: str | None = None, with_bos: bool = True) -> str:
    """Return the template in jinja, for `apply_chat_template`: text, images and videos in the order they are given.

    Args:
        system_message: Used when the messages hold no system turn; None means the template's.
        with_bos: Begin with the tokenizer's `bos_token`, as InternLM2 needs and Qwen2 does not.
    """

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    content = (
        "{% macro write(content) %}"
        "{% if content is string %}{{ content }}{% else %}"
        "{% for item in content %}"
        "{% if item['type'] == 'text' %}{{ item['text'] }}"
        "{% elif item['type'] == 'image' %}{{ '" + IMAGE_PLACEHOLDER + "\\n' }}"
        "{% elif item['type'] == 'video' %}{{ '" + VIDEO_PLACEHOLDER + "\\n' }}"
        "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    )
    gap = literal(template.gap) if template.gap else ""
    return "".join(
        [
            content,
            "{{ bos_token }}" if with_bos else "",
            "{% if messages[0]['role'] != 'system' %}",
            literal(_system_part(template, system_message)),
            "{% endif %}",
            "{% for message in messages %}",
            "{% if message['role'] == 'system' %}" + literal(template.system_header),
            "{% elif message['role'] == 'user' %}" + literal(template.user_header),
            "{% elif message['role'] == 'assistant' %}" + literal(template.assistant_header),
            "{% else %}{{ raise_exception('Unknown role ' ~ message['role'] ~ '; use system, user or assistant.') }}",
            "{% endif %}",
            "{% if message['role'] == 'assistant' %}{% generation %}{{ write(message['content']) }}",
            literal(template.separator) + "{% endgeneration %}" + gap,
            "{% else %}{{ write(message['content']) }}" + literal(template.separator) + gap + "{% endif %}",
            "{% endfor %}",
            "{% if add_generation_prompt %}" + literal(template.assistant_header) + "{% endif %}",
        ]
    )


# --- token ids -------------------------------------------------------------------------------------------------------

# Nobody can type these: they are drawn afresh in every process.
_MARK = "\ue000" + secrets.token_hex(8) + "\ue001"
_SECRET_NAME = "\ue002" + secrets.token_hex(8)


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: str, subject: str = "The text") -> str:
    """Return the text itself, if it can be encoded.

    Raises:
        ValueError: It holds half of a surrogate pair, which is not a character.
    """
    if found := _LONE_SURROGATE.search(text):
        raise ValueError(
            f"{subject} holds the lone surrogate U+{ord(found[0]):04X} at {found.start()}, which is no character; decode it "
            'again, or replace it: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        )
    return text


class ControlToken(str):
    """The spelling of a control token, with the normalizer that the tokenizer applies to text before it looks for one."""

    normalizer: Normalizer | None = None

    def arises_in(self, text: str) -> bool:
        """Tell whether the tokenizer's normalizer makes this spelling out of other characters, full-width ones for example."""
        normalized = self.normalizer.normalize_str(text)
        return str(self) in normalized or self.normalizer.normalize_str(str(self)) in normalized


def control_tokens(tokenizer, grounding_tokens: bool = False) -> list[ControlToken]:
    """Return every spelling that `tokenizer` turns into an added token; with `grounding_tokens` leave out those of boxes."""
    allowed = GROUNDING_TOKENS if grounding_tokens else ()
    tokens = [ControlToken(token) for token in tokenizer.get_added_vocab() if str(token) not in allowed]
    for token in tokens:
        token.normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    return tokens


def protect(text: str, spellings: list[str]) -> str:
    """Mark the control-token `spellings` in text that is not to be trusted.

    Raises:
        ValueError: A lone surrogate in the text.
    """
    longest_first = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
    marked = re.sub(longest_first or r"(?!)", lambda match: match[0][0] + _MARK + match[0][1:], check_text(text))
    if marked == text and any(getattr(token, "normalizer", None) and token.arises_in(text) for token in spellings):
        # A single mark, wherever it stands, has the whole prompt encoded with spellings that no text can be normalized to.
        return marked + _MARK
    return marked


def unprotect(text: str) -> str:
    """Return the text as it was before `protect`."""
    return text.replace(_MARK, "")


def has_protected_text(text: str) -> bool:
    """Tell whether `protect` marked anything in this text."""
    return _MARK in text


def begins_with_bos(tokenizer) -> bool:
    """Tell whether prompts of this tokenizer begin with its `bos_token`, as those of InternLM2 do."""
    if tokenizer.bos_token is None:
        return False
    if tokenizer.chat_template is not None:
        return "bos_token" in str(tokenizer.chat_template)
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_parts(tokenizer, parts: list[str]) -> tuple[list[int], list[tuple[int, int]] | None, list[int]]:
    """Encode a prompt that is given in parts, in one piece, nothing added in front or behind; protected spellings are encoded
    as plain text.

    Returns:
        The token ids; where each token begins and ends in characters, if the tokenizer is a fast one; where each part ends.

    Raises:
        ValueError: The text holds protected spellings and the tokenizer is not a fast one, or a lone surrogate.
    """
    if any(_MARK in part for part in parts):
        if not tokenizer.is_fast:
            raise ValueError(
                "The text spells a control token; to encode it as plain text a fast tokenizer (tokenizer.json) is needed."
            )
        renamed, twin = _with_secret_control_tokens(tokenizer)
        longest_first = re.compile("|".join(map(re.escape, sorted(renamed, key=len, reverse=True))) or r"(?!)")
        parts = [unprotect(longest_first.sub(lambda match: renamed[match[0]], part)) for part in parts]
        encoding = twin.encode(check_text("".join(parts)), add_special_tokens=False)
        return encoding.ids, encoding.offsets, list(accumulate(map(len, parts)))
    inputs = tokenizer(check_text("".join(parts)), add_special_tokens=False)
    offsets = inputs.encodings[0].offsets if tokenizer.is_fast else None
    return inputs["input_ids"], offsets, list(accumulate(map(len, parts)))


# Making a twin takes a second for a vocabulary of 92,000.
_twins: "weakref.WeakKeyDictionary[object, tuple[dict[str, int], dict[str, str], Tokenizer]]" = (
    weakref.WeakKeyDictionary()
)


def _with_secret_control_tokens(tokenizer) -> tuple[dict[str, str], Tokenizer]:
    """Return a twin of `tokenizer` whose added tokens have the same ids and flags but spellings that nobody can type."""
    added = tokenizer.get_added_vocab()
    if tokenizer in _twins and _twins[tokenizer][0] == added:
        return _twins[tokenizer][1:]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    renamed = {token["content"]: f"{_SECRET_NAME}{token['id']}\ue003" for token in state["added_tokens"]}
    for token in state["added_tokens"]:
        token["content"] = renamed[token["content"]]
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {renamed.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # unigram: a list of (piece, score)
        state["model"]["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in state["model"]:  # a control token that is a word of the vocabulary may be the product of merges
        state["model"]["merges"] = [
            pair for pair in state["model"]["merges"] if not renamed.keys() & {pair[0], pair[1], "".join(pair)}
        ]
    if state["model"].get("unk_token") in renamed:
        state["model"]["unk_token"] = renamed[state["model"]["unk_token"]]
    # Options of the tokenizer's last call are part of its state.
    state["post_processor"] = state["truncation"] = state["padding"] = None
    _twins[tokenizer] = (added, renamed, Tokenizer.from_str(json.dumps(state)))
    return _twins[tokenizer][1:]


# --- placeholders ----------------------------------------------------------------------------------------------------


def check_placeholders(
    texts: list[str], given: int, subject: str = "The text", placeholder: str = IMAGE_PLACEHOLDER, earlier: int = 0
) -> None:
    """Raise `ValueError` about `subject` unless `texts` have one placeholder for each of `given` images or videos.

    Of the texts `earlier` are of earlier turns, whose images are most often forgotten.
    """
    placeholders, kind = sum(text.count(placeholder) for text in texts), placeholder.strip("<>")
    if placeholders != given:
        in_history, hint = sum(text.count(placeholder) for text in texts[:earlier]), ""
        if given < in_history:
            hint = f" The history is about {in_history} of them: every turn is given those of the whole conversation, in order."
        raise ValueError(
            f"{subject} has {placeholders} {placeholder} placeholders, but {given} {kind}s were given; "
            f"each {kind} needs exactly one.{hint}"
        )


@dataclass(frozen=True)
class SlicedImage:
    """How an image is written whose views have tokens of their own: its overview, then its slices row by row."""

    columns: int
    rows: int
    overview_tokens: int
    slice_tokens: int
    """0: there are no slices."""

    @property
    def tokens(self) -> int:
        """The image tokens of all views."""
        return self.overview_tokens + self.columns * self.rows * self.slice_tokens


ImageLayout = int | SlicedImage
"""How an image is written: by its number of square tiles, or slices."""


def image_text(layout: ImageLayout, tokens_per_tile: int) -> str:
    """Return what stands in a prompt for an image.

    Square tiles are one run of image tokens. Slices are written as MiniCPM-V 2.0 and 2.5 do: every view with a start and
    an end, rows of slices as lines of text between `<slice>` and `</slice>`.
    """

    if isinstance(layout, int):
        return IMAGE_START + IMAGE_TOKEN * (tokens_per_tile * layout) + IMAGE_END
    overview, part = (
        IMAGE_START + IMAGE_TOKEN * tokens + IMAGE_END for tokens in (layout.overview_tokens, layout.slice_tokens)
    )
    rows = "\n".join([part * layout.columns] * layout.rows)
    return overview + SLICES_START + rows + SLICES_END if layout.slice_tokens else overview


def image_tokens(layout: ImageLayout, tokens_per_tile: int) -> int:
    """Count the image tokens of an image."""
    return tokens_per_tile * layout if isinstance(layout, int) else layout.tokens


def expand_placeholders(texts: list[str], images: Sequence[ImageLayout], tokens_per_tile: int) -> list[str]:
    """Put each image's tokens where its `<image>` stands; the images belong to the placeholders in order.

    Raises:
        ValueError: The numbers of placeholders and images differ.
    """
    check_placeholders(texts, len(images))
    layouts = iter(images)
    return [
        "".join(
            part if i == 0 else image_text(next(layouts), tokens_per_tile) + part
            for i, part in enumerate(text.split(IMAGE_PLACEHOLDER))
        )
        for text in texts
    ]


# --- rendering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedPrompt:
    """The token ids (N) of a conversation, and where its answers stand in them.

    `answers` holds (start, stop) for each answer, the separator that ends it included; an answer starts where the prompt of
    its turn ended. None: the tokenizer is not a fast one, which cannot tell.
    """

    token_ids: list[int]
    answers: list[tuple[int, int]] | None


def write_turns(
    template: ChatTemplate, turns: Sequence[tuple[str, str | None]], system_message: str | None = None
) -> list[str]:
    """Write turns of (question, answer): prompts and answers alternate, each answer with the separator that ends it.

    Args:
        turns: The last answer may be None.
        system_message: None means the template's, "" an empty one.
    """
    parts: list[str] = []
    for question, answer in turns:
        beginning = template.gap if parts else _system_part(template, system_message)
        asked = template.user_header + question + template.separator + template.gap
        parts.append(beginning + asked + template.assistant_header)
        if answer is not None:
            parts.append(answer + template.separator)
    return parts


def render(
    tokenizer,
    template: ChatTemplate,
    turns: Sequence[tuple[str, str | None]],
    system_message: str | None = None,
    tiles: Sequence[ImageLayout] = (),
    tokens_per_tile: int = 0,
    grounding_tokens: bool = False,
) -> RenderedPrompt:
    """Write a conversation by its template and encode it, in one piece.

    What people wrote is plain text, whatever control tokens it spells. In questions `<image>` is the place of an image; in
    answers and the system message it is a word.

    Args:
        turns: (question, answer) each; the last answer may be None, and the prompt then ends where the model answers.
        system_message: None means the template's, "" an empty one.
        tiles: How many tiles each image has, in the order of their placeholders, or how it is sliced.
        tokens_per_tile: Image tokens of one tile.
        grounding_tokens: Whether `<ref>`, `<box>` and `<quad>` are control tokens in what people wrote.

    Raises:
        ValueError: The numbers of placeholders and images differ, a lone surrogate, or a text that spells a control token and
            a tokenizer that is not a fast one.
    """
    spellings = control_tokens(tokenizer, grounding_tokens)
    words = [*spellings, IMAGE_PLACEHOLDER]
    questions = expand_placeholders([protect(text, spellings) for text, _ in turns], list(tiles), tokens_per_tile)
    answers = [None if answer is None else protect(answer, words) for _, answer in turns]
    system = None if system_message is None else protect(system_message, words)
    parts = write_turns(template, list(zip(questions, answers)), system)
    if begins_with_bos(tokenizer):
        parts[0] = tokenizer.bos_token + parts[0]
    token_ids, offsets, ends = encode_parts(tokenizer, parts)
    if offsets is None:
        return RenderedPrompt(token_ids, None)
    token_ends = [end for _, end in offsets]
    borders = [bisect_right(token_ends, end) for end in ends]
    return RenderedPrompt(token_ids, list(zip(borders[::2], borders[1::2])))


# --- messages --------------------------------------------------------------------------------------------------------


def has_images(messages: list) -> bool:
    """Tell whether chat messages (one conversation or a batch of them) hold an image."""
    if isinstance(messages, (list, tuple)):
        return any(map(has_images, messages))
    content = messages.get("content")
    return isinstance(content, (list, tuple)) and any(item["type"] in ("image", "image_url") for item in content)


ROLES = ("system", "user", "assistant")
# What the templates write for an item that is not text.
_WRITTEN = {
    "image": f"{IMAGE_PLACEHOLDER}\n",
    "image_url": f"{IMAGE_PLACEHOLDER}\n",
    "video": f"{VIDEO_PLACEHOLDER}\n",
}


def check_messages(messages: list) -> None:
    """Check that chat messages (one conversation or a batch of them) are what the templates can write.

    Raises:
        ValueError: No messages, a role that is unknown, content or an item that is neither text nor an image nor a video,
            or text that is not a string of whole characters.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            f'messages are a list like [{{"role": "user", "content": "Hello"}}] with one or more in it, got {messages!r}.'
        )
    if all(isinstance(message, (list, tuple)) for message in messages):
        for conversation in messages:
            if any(isinstance(message, (list, tuple)) for message in conversation):
                raise ValueError(
                    "messages are a list of messages or a batch of such lists, but these are nested deeper."
                )
            check_messages(conversation)
        return
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(
                f"A message is a dict with role and content, got {type(message).__name__} {message!r:.80}."
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"Unknown role {role!r:.80}; use system, user or assistant.")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"The content of a message is a string or a list of items, but that of a {role} message is "
                f"{type(content).__name__} {content!r:.80}."
            )
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind != "text" and kind not in tuple(_WRITTEN):
                raise ValueError(
                    f"An item of a {role} message is a dict with a type, one of text, {', '.join(_WRITTEN)}, got {item!r:.80}."
                )
            if kind == "text" and not isinstance(item.get("text"), str):
                text = item.get("text")
                raise ValueError(f"The text of an item of a {role} message must be a string, got {text!r:.80}.")
            if kind == "text":
                check_text(item["text"], f"The {role} message")


def protect_messages(messages: list, spellings: list[str]) -> list:
    """Return a copy of chat messages (one conversation or a batch of them, see `check_messages`) in which every text is
    protected.

    Raises:
        ValueError: A lone surrogate in a text.
    """
    if isinstance(messages[0], (list, tuple)):
        return [protect_messages(conversation, spellings) for conversation in messages]
    protected = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            protected.append({**message, "content": protect(content, spellings)})
            continue
        # A spelling may be spread over neighbours, which the template joins: it begins in one and ends in another.
        written = [item["text"] if item["type"] == "text" else _WRITTEN[item["type"]] for item in content]
        joined, ends = "".join(written), list(accumulate(map(len, written)))
        is_spread = any(
            spelling in joined[max(0, end - len(spelling) + 1) : end + len(spelling) - 1]
            for end in ends
            for spelling in spellings
        )
        arises = any(getattr(token, "normalizer", None) and token.arises_in(joined) for token in spellings)
        border = _MARK if is_spread or arises else ""
        items = [
            {**item, "text": border + protect(item["text"], spellings) + border} if item["type"] == "text" else item
            for item in content
        ]
        protected.append({**message, "content": items})
    return protected


def read_messages(messages: list[dict]) -> tuple[str | None, list[tuple[str, str]], str, list[Any], list[Any]]:
    """Take chat messages apart: (system message or None, history, question, images, videos), placeholders in the questions.

    Args:
        messages: In the form of transformers or OpenAI: a system message or none, then user and assistant alternating, a user
            last. An item of a user's content is a text, an image (`image`, `url`, `path` or `base64`, or OpenAI's
            `image_url`) or a video (`video`, `url` or `path`).

    Raises:
        ValueError: Messages that `check_messages` refuses, a batch of conversations, another order of roles, an image or video
            that is not from a user, or without a source.
    """
    check_messages(messages)
    roles = [message.get("role") if isinstance(message, dict) else "list" for message in messages]
    turns = messages[roles[0] == "system" :]
    if roles[roles[0] == "system" :] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            "messages of chat are one conversation: a system message or none, then user and assistant by turns, a user last; "
            f"the roles are {', '.join(roles)}."
        )
    system = _written(messages[0], {}) if roles[0] == "system" else None
    media: dict[str, list] = {"image": [], "video": []}
    texts = [_written(message, media) for message in turns]
    history = list(zip(texts[:-1:2], texts[1::2]))
    return system, history, texts[-1], media["image"], media["video"]


def _written(message: dict, media: dict[str, list]) -> str:
    """Return the text of a message with placeholders in it; images and videos are added to `media`."""
    role, content = message["role"], message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = []
    for item in items:
        kind = item["type"].removesuffix("_url")
        if kind == "text":
            is_word = role == "user" and (IMAGE_PLACEHOLDER in item["text"] or VIDEO_PLACEHOLDER in item["text"])
            text = item["text"]
            parts.append(protect(text, [IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER]) if is_word else text)
            continue
        if role != "user":
            raise ValueError(f"A {kind} belongs to a user, but a {role} message holds one.")
        source = item.get(item["type"])
        source = source.get("url") if isinstance(source, dict) else source
        sources = [source, *(item.get(name) for name in ("url", "path", "base64"))]
        given = [source for source in sources if source is not None]
        if len(given) != 1:
            raise ValueError(
                f"An item of type {item['type']} names its source once, as {item['type']!r}, 'url', 'path' or 'base64'; "
                f"got {sorted(map(str, item))}."
            )
        media[kind].append(given[0])
        parts.append(_WRITTEN[kind])
    return "".join(parts)


def write_messages(
    history: list[tuple[str, str]],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system_message: str | None = None,
) -> list[dict]:
    """Write turns as chat messages, each image and video in the place of its placeholder.

    Raises:
        ValueError: The numbers of placeholders and of images or videos differ.
    """
    questions = [question for question, _ in history]
    check_placeholders(questions, len(images))
    check_placeholders(questions, len(videos), placeholder=VIDEO_PLACEHOLDER)
    sources = {IMAGE_PLACEHOLDER: iter(images), VIDEO_PLACEHOLDER: iter(videos)}
    messages = [] if system_message is None else [{"role": "system", "content": system_message}]
    for question, answer in history:
        content = []
        for part in re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})\n?", question):
            if part in sources:
                kind = part.strip("<>")
                content.append({"type": kind, kind: next(sources[part])})
            elif part:
                content.append({"type": "text", "text": part})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages
