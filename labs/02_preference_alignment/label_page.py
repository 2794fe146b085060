"""The page on which a person labels: two answers side by side, buttons and keys. Which pair it shows comes from the store.

Gradio runs in the process that serves it, for every labeler at once, so nothing of one labeler is kept here: who asks comes
with each request (`request.username`, set by the login), and which pair was on the screen is sent along with the answer.
Prompts and answers are put into text boxes, which show text and never HTML.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path

from label_store import Conflict, LabelStore, Task, UnknownPresentation
from shared import LabsError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: a labeler's page calls nobody

import gradio as gr  # noqa: E402

BUTTONS = {
    "a": "A is better [a]",
    "b": "B is better [b]",
    "tie": "Tie [t]",
    "both_bad": "Both bad [n]",
    "skip": "Skip [s]",
}
HELP = """<p>Read the request and both answers, then choose the better one. Sides are drawn at random.</p>
<p>Keys: <kbd>a</kbd> left is better, <kbd>b</kbd> right is better, <kbd>t</kbd> tie, <kbd>n</kbd> both bad, <kbd>s</kbd> skip,
<kbd>1</kbd>-<kbd>5</kbd> how sure you are, <kbd>u</kbd> undo your last answer. While you write a reason the keys
are letters; <kbd>Esc</kbd> leaves the box.</p><p><a href="/logout">Log out</a></p>"""


def build_page(store: LabelStore) -> gr.Blocks:
    """The page as Gradio blocks; mount it with `page_settings()` behind a login that gives the labeler's number."""
    with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            progress = gr.HTML(elem_id="progress")
            undo = gr.Button("Undo [u]", elem_id="undo", size="sm", scale=0, min_width=110)
        message = gr.HTML(elem_id="message")
        with gr.Column(visible="hidden") as work:
            shown = gr.Textbox(elem_id="shown", interactive=False)  # hidden by label_page.css
            prompt = _text("Request", "prompt", 2)
            with gr.Row():
                left, right = _text("Answer A", "left", 4), _text("Answer B", "right", 4)
            with gr.Row():
                confidence = gr.Radio(
                    [("1 guess", 1), ("2", 2), ("3", 3), ("4", 4), ("5 certain", 5)],
                    value=3,
                    label="How sure are you? [1-5]",
                    elem_id="confidence",
                )
                reasoning = gr.Textbox(
                    label="Why? (optional)", elem_id="reasoning", lines=2, max_lines=8, interactive=True
                )
            with gr.Row(elem_id="choices"):
                choices = [
                    gr.Button(text, elem_id=f"choice_{choice}", variant="primary" if choice in "ab" else "secondary")
                    for choice, text in BUTTONS.items()
                ]
        with gr.Accordion("How to label", open=True, elem_id="help"):
            gr.HTML(HELP)

        outputs = [shown, prompt, left, right, work, progress, message, confidence, reasoning]
        # Not queued: each request is answered on its own, so that one slow page holds up no other, and a restarted
        # server owes nobody anything. `private` keeps the handlers out of Gradio's description of its API.
        settings = {"outputs": outputs, "queue": False, "api_visibility": "private", "show_progress": "hidden"}
        ready = {"fn": None, "js": "() => window.labels && window.labels.ready()"}
        events = [page.load(_shower(store), **settings), undo.click(_undoer(store), **settings)]
        for choice, button in zip(BUTTONS, choices, strict=True):
            events.append(button.click(_answerer(store, choice), [shown, confidence, reasoning], **settings))
        for event in events:
            event.then(**ready)
    return page


def page_settings() -> dict:
    """What `gr.mount_gradio_app` needs besides the blocks: nothing comes from the network, not even a font."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    here = Path(__file__).parent
    return {
        "theme": gr.themes.Default(font=sans, font_mono=mono),
        "css": (here / "label_page.css").read_text(encoding="utf-8"),
        "js": (here / "label_page.js").read_text(encoding="utf-8"),
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "show_error": False,
        "app_kwargs": {"docs_url": None, "redoc_url": None, "openapi_url": None},
    }


def _text(label: str, name: str, lines: int) -> gr.Textbox:
    """A box for foreign text, as high as the text up to a screenful."""
    return gr.Textbox(label=label, elem_id=name, lines=lines, max_lines=24, interactive=False, autoscroll=False)


def _shower(store: LabelStore) -> Callable:
    def show(request: gr.Request) -> list:
        try:
            return _next(store, int(request.username))
        except LabsError as error:
            return _keep(str(error))

    return show


def _answerer(store: LabelStore, choice: str) -> Callable:
    def answer(shown: str, confidence: int, reasoning: str, request: gr.Request) -> list:
        labeler = int(request.username)
        try:
            try:
                store.submit(labeler, shown or "", choice, confidence, reasoning or "")
            except (Conflict, UnknownPresentation) as error:  # this pair is over for this labeler: on to the next one
                return _next(store, labeler, f"Not stored: {error}")
            return _next(store, labeler)
        except LabsError as error:  # the labeler can mend it: what they wrote stays
            return _keep(f"Not stored: {error}")

    return answer


def _undoer(store: LabelStore) -> Callable:
    def undo(request: gr.Request) -> list:
        try:
            task = store.undo(int(request.username))
        except LabsError as error:
            return _keep(str(error))
        return _keep("There is no answer to take back.") if task is None else _pair(task, "Taken back. Answer again.")

    return undo


def _next(store: LabelStore, labeler: int, message: str = "") -> list:
    task = store.next_task(labeler)
    if task is not None:
        return _pair(task, message)
    done, total = store.progress(labeler)
    end = (
        "All done. Thank you!"
        if done >= total
        else "Other people have the last pairs just now. Reload in some minutes."
    )
    return ["", "", "", "", gr.Column(visible="hidden"), _progress(done, total), _note(f"{message} {end}"), 3, ""]


def _pair(task: Task, message: str) -> list:
    texts = [task.presentation_id, task.prompt, task.left, task.right]
    return [*texts, gr.Column(visible=True), _progress(task.done, task.total), _note(message), 3, ""]


def _keep(message: str) -> list:
    """The page as it is, with a message."""
    return [*[gr.skip()] * 6, _note(message), gr.skip(), gr.skip()]


def _progress(done: int, total: int) -> str:
    return f"<b>{done} of {total}</b> labelled"


def _note(message: str) -> str:
    return f"<p>{html.escape(message.strip())}</p>" if message.strip() else ""
