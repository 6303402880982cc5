"""The page in the browser: what stands where, and which function answers what.

    demo = build(answerer, preset="default")
    demo.launch(**LAUNCH)

Every visitor has a `Visit` of their own in gradio's session, which the server keeps; nothing that the browser sends is taken
for what was said before.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from minimonkey.scripts.demonstration.answers import Answerer, Conversation, Drawing, Figures, Settings
from minimonkey.scripts.demonstration.media import MOST_BYTES, MOST_PAGES, SUFFIXES, Medium, read_address, read_file
from minimonkey.scripts.repository import ROOT
from minimonkey.tiling import PRESETS


TITLE = "MiniMonkey"
IDLE = 3600  # seconds after which a visit, and what was uploaded in it, is deleted
MOST_VISITS = 100  # kept at a time; the oldest go first
MOST_TOKENS = 1024  # of an answer
THUMBNAIL = 256  # pixels
ENDED = {"length": "tokens answered, the limit", "repetition": "tokens, ended: it repeated itself"}
CERTAIN, LIKELY = 0.9, 0.5  # words of less than these probabilities are marked

EXAMPLES = [
    ("What is the total?", "assets/receipt.png"),
    ("Which shop is this from?", "cookbook/receipts/receipt-6.jpg"),
    ("Read the text.", "cookbook/receipts/receipt-1.jpg"),
    ("What is the total?", "cookbook/receipts.pdf"),
]

LEGEND = (
    '<div class="legend"><div><i class="detailed"></i>seams of the detailed grid</div><div><i class="adaptive"></i>of the '
    'adaptive grid</div><div><i class="dropped"></i>left out by SCM</div></div>'
)

CSS = """
.gradio-container {max-width: 1320px !important; margin: auto}
#head h1 {margin: 0; font-size: 1.5rem}
#head p, .legend, .figures small, .words + small {margin: 0; opacity: .72}
.legend {display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .8rem}
.legend div {display: flex; align-items: center; gap: 6px; white-space: nowrap}
.legend i {display: inline-block; width: 22px; height: 0; border-top: 3px solid}
.legend .detailed {border-color: rgb(40, 110, 255)}
.legend .adaptive {border-color: rgb(255, 140, 0); border-top-style: dashed}
.legend .dropped {height: 14px; border: 0; background: #444}
.figures {display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px}
.figures > div {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 10px}
.figures b {display: block; font-size: 1.1rem; font-variant-numeric: tabular-nums}
.words {margin: 10px 0 4px; max-height: 190px; overflow: auto; line-height: 1.7; font-family: var(--font-mono);
  white-space: pre-wrap; overflow-wrap: anywhere}
.words .likely {background: rgba(255, 180, 0, .28); border-radius: 3px}
.words .unlikely {background: rgba(240, 60, 60, .3); border-radius: 3px}
#gallery .caption {white-space: normal; font-weight: normal; font-size: .8rem; line-height: 1.2}
#chat button[title="Share"] {display: none}
#gallery .preview {background: var(--background-fill-primary); backdrop-filter: none}
footer {display: none !important}
"""

LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Base(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
    "css": CSS,
    "max_file_size": MOST_BYTES,
    "state_session_capacity": MOST_VISITS,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "share": False,
}


@dataclass(eq=False)
class Visit:
    """One visitor's conversation, and the messages that their page shows."""

    conversation: Conversation = field(default_factory=Conversation)
    shown: list[dict[str, Any]] = field(default_factory=list)


def build(answerer: Answerer, preset: str = "default", subject: str = "", at_once: int = 2) -> gr.Blocks:
    """Build the page.

    Args:
        preset: The tile ranges that are chosen at first, see `tiling.PRESETS`; empty: those of the processor.
        subject: What answers, in a line under the title.
        at_once: How many answers are made at a time; other visitors wait in a queue.
    """
    page = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(IDLE, IDLE))
    with page:
        visit = gr.State(Visit(), time_to_live=IDLE)
        gr.HTML(f"<h1>{TITLE}</h1><p>{html.escape(subject)}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=6, min_width=340):
                chat = gr.Chatbot(
                    show_label=False,
                    height=430,
                    elem_id="chat",
                    render_markdown=False,
                    allow_tags=False,
                    buttons=[],
                    feedback_options=None,
                    allow_file_downloads=False,
                    placeholder="Upload or paste an image, a PDF or a clip, and ask about it.",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    elem_id="box",
                    placeholder="Ask about what you upload or paste here",
                    file_types=list(SUFFIXES),
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=10_000,
                    autofocus=True,
                )
                with gr.Row():
                    use_scm = gr.Checkbox(
                        label="Compress (SCM)",
                        info="Only the detailed tokens that matter most are read",
                        elem_id="scm",
                        min_width=200,
                    )
                    keep = gr.Slider(0.1, 1.0, 0.5, step=0.05, label="Share kept", elem_id="keep", min_width=200)
                fresh = gr.Button("New conversation", elem_id="fresh", size="sm")
            with gr.Column(scale=5, min_width=320):
                gallery = gr.Gallery(
                    label="What the model sees",
                    elem_id="gallery",
                    height=400,
                    preview=True,
                    object_fit="contain",
                    buttons=["fullscreen"],
                    interactive=False,
                )
                gr.HTML(LEGEND)
                figures = gr.HTML(elem_id="figures")
                with gr.Accordion("Addresses, pages, tiles, length", open=False, elem_id="more"):
                    address = gr.Textbox(
                        "", label="Address of an image, PDF or clip", placeholder="https://…", elem_id="address"
                    )
                    pages = gr.Textbox(
                        "",
                        label="Pages of a PDF or TIFF",
                        placeholder="all",
                        info=f"Such as 1-3 or 2,5; at most {MOST_PAGES} at once",
                        elem_id="pages",
                    )
                    choices = [("as the model has it", ""), *((name, name) for name in PRESETS)]
                    cut = gr.Dropdown(
                        choices, value=preset, label="Tiles", info="How finely images are cut", elem_id="cut"
                    )
                    longest = gr.Slider(
                        16, MOST_TOKENS, 256, step=16, label="Longest answer, in tokens", elem_id="longest"
                    )
        examples = [[{"text": text, "files": [str(ROOT / path)]}] for text, path in EXAMPLES]
        gr.Examples(examples, [box], label="Examples")
        settings = [cut, use_scm, keep, longest]

        def respond(asked: dict, url: str, chosen: str, cut, use_scm, keep, longest, visit: Visit) -> Iterator[tuple]:
            url, chosen = (url or "").strip(), chosen or ""  # None in an accordion that was never opened
            before = (asked, url, visit.shown, _gallery(visit.conversation.drawings), gr.skip(), visit)
            try:
                media = [medium for path in asked["files"] for medium in read_file(path, chosen)]
                media += read_address(url, chosen) if url else []
                chosen_settings = Settings(cut, bool(use_scm), float(keep), min(int(longest), MOST_TOKENS))
                question = {"role": "user", "content": [*_thumbnails(media, chat), _as_text(asked["text"])]}
                running = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
                shown_drawings = gr.skip()
                for step in answerer.ask(visit.conversation, asked["text"], media, chosen_settings):
                    if step.drawings is not None:
                        shown_drawings = _gallery(step.drawings)
                    messages = [*visit.shown, question, {"role": "assistant", "content": _as_text(step.answer) or "…"}]
                    panel = gr.skip() if step.figures is None else _figures(step.figures, step.words)
                    yield running, "", messages, shown_drawings, panel, visit
                    shown_drawings = gr.skip()
                if step.answer:
                    visit.shown = messages
                ready = gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False)
                yield ready, "", visit.shown, gr.skip(), gr.skip(), visit
            except (ValueError, OSError) as error:
                box = gr.MultimodalTextbox(value=before[0], submit_btn=True, stop_btn=False)
                yield box, *before[1:]
                gr.Warning(html.escape(str(error)), duration=20)

        outputs = [box, address, chat, gallery, figures, visit]
        asking = box.submit(
            respond,
            [box, address, pages, *settings, visit],
            outputs,
            concurrency_limit=at_once,
            show_progress="hidden",
            api_visibility="private",
        )
        # Whatever went wrong that is a fault of ours, which gradio says and logs: the visitor can ask again.
        asking.failure(
            lambda: gr.MultimodalTextbox(submit_btn=True, stop_btn=False), None, box, api_visibility="private"
        )
        box.stop(lambda visit: visit.conversation.stop(), visit, None, queue=False, api_visibility="private")

        def start_anew(visit: Visit) -> tuple:
            visit.conversation.stop()
            return gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False), "", [], [], "", Visit()

        gr.on(
            [fresh.click, chat.clear],
            start_anew,
            visit,
            outputs,
            cancels=[asking],
            queue=False,
            api_visibility="private",
        )
    return page


def _as_text(text: str) -> str:
    """Return text as the chatbot shows it unchanged, since it takes tags for HTML."""
    return html.escape(text, quote=False)


def _thumbnails(media: list[Medium], chat: gr.Chatbot) -> list[dict[str, str]]:
    """Return what a message shows of images and videos: each in small, stored where gradio serves files from."""
    contents = []
    for medium in media:
        small = medium.shown[0].copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        path = save_pil_to_cache(small, cache_dir=chat.GRADIO_CACHE, format="webp")
        contents.append({"path": path, "alt_text": medium.name})
    return contents


def _gallery(drawings: list[Drawing]) -> gr.Gallery:
    shown = [(drawing.image, drawing.caption) for drawing in drawings]
    return gr.Gallery(value=shown, selected_index=len(shown) - 1 if shown else None)


def _figures(figures: Figures, words: list[tuple[str, float]] | None) -> str:
    """Return the panel of an answer: what it took, and how certain the model was of each word."""
    read = f"{figures.read_tokens:,}"
    if figures.read_tokens < figures.prompt_tokens:
        read += f" of {figures.prompt_tokens:,}"
    confidence = "" if figures.confidence is None else f"{figures.confidence:.0%}"
    cells = [
        (confidence, "confidence"),
        (read, "prompt tokens read"),
        (f"{figures.tiles}", "tiles"),
        (f"{figures.answer_tokens}", ENDED.get(figures.finish_reason, "tokens answered")),
        (f"{figures.first_seconds:.2f} s", "to the first word"),
        (f"{figures.seconds:.2f} s", "in all"),
    ]
    table = "".join(f"<div><b>{value}</b><small>{name}</small></div>" for value, name in cells if value)
    marked = "".join(
        f'<span class="{"certain" if p >= CERTAIN else "likely" if p >= LIKELY else "unlikely"}" title="{p:.0%}">'
        f"{html.escape(word)}</span>"
        for word, p in words or []
    )
    legend = "<small>word by word; marked below 90% (yellow) and 50% (red)</small>" if marked else ""
    return f'<div class="figures">{table}</div><div class="words">{marked}</div>{legend}'


__all__ = ["LAUNCH", "build"]
