"""The page's layout, and the server that shows it (Gradio)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from r2id.app.actions import Actions
from r2id.app.tabs import autoencoder_tab, draw_tab, edit_tab, messages_of
from r2id.errors import InputError

_QUEUE = 64
"""Requests that wait, at most."""
_UPLOAD = "64mb"
_CSS = """
.drawn img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
footer {display: none !important}
"""


def serve(actions: Actions, title: str, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until the process is stopped; ``ready`` is told its address.

    Files that it needs are in a temporary folder, which is removed at the end. Raises InputError
    when Gradio is not installed or the port is in use.
    """
    _check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="r2id-app-") as folder:
        os.environ.update(
            GRADIO_TEMP_DIR=folder,
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_EXAMPLES_CACHE=str(Path(folder) / "examples"),
            HF_HUB_DISABLE_TELEMETRY="1",
        )
        try:
            import gradio
        except ImportError:
            raise InputError("the page needs Gradio: pip install 'r2id[app]'") from None
        # Fonts of the system's own: Gradio's are fetched from elsewhere.
        font = ["system-ui", "sans-serif"]
        theme = gradio.themes.Default(font=font, font_mono=["monospace"])
        page = build(actions, title)
        # So that the first visit waits less.
        actions.draw(actions.first_request, actions.first_size)
        page.queue(default_concurrency_limit=1, max_size=_QUEUE, api_open=False)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=True,
            ssr_mode=False,
            max_file_size=_UPLOAD,
            footer_links=[],
            theme=theme,
            css=_CSS,
        )
        # Ends the block, so that what is temporary is removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            ready(address)
            page.block_thread()
        finally:
            page.close(verbose=False)


def build(actions: Actions, title: str) -> Any:
    """Lay the page out → Gradio's Blocks."""
    import gradio as gr

    messages = messages_of(gr.Error)
    height, width = actions.first_size
    # Pictures are removed by age, also those that an open tab still shows and goes on with.
    with gr.Blocks(title=f"r2id · {title}", delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(f"## r2id · {title}")
        with gr.Row():
            controls = _drawing_controls(gr, actions)
        with gr.Tab("Draw"):
            draw_tab(gr, page, actions, controls, messages, (height, width))
        with gr.Tab("Edit"):
            edit_tab(gr, actions, controls, messages, (height, width))
        if actions.has_autoencoder:
            with gr.Tab("Autoencoder"):
                autoencoder_tab(gr, actions, messages)
    sliders: list[Any] = [block for block in page.blocks.values() if isinstance(block, gr.Slider)]
    for slider in sliders:
        slider.preprocess = partial(_slider_value, slider.preprocess, slider.minimum)
    return page


def _slider_value(preprocess: Callable[[float], float], least: float, given: float | None) -> float:
    """Take a slider whose number was left empty for its least, which the page shows then."""
    return preprocess(least if given is None else given)


def _drawing_controls(gr: Any, actions: Actions) -> list[Any]:
    """Add the controls of what is drawn, in the order in which ``_request`` takes their values."""
    sampler = actions.pipe.sampler
    classes, names = actions.classes, list(sampler.attributes)
    first = actions.first_request
    return [
        gr.Dropdown(
            [("any", None), *((name, label) for label, name in enumerate(sampler.class_names))],
            value=first.label,
            label="Class",
            visible=bool(classes),
            elem_id="label",
        ),
        gr.Dropdown(
            [*names, *(f"-{name}" for name in names)],
            multiselect=True,
            label="Attributes (with a minus: without)",
            visible=bool(names),
            elem_id="attributes",
        ),
        gr.Number(first.seed, label="Seed", precision=0, minimum=0, maximum=2**53, elem_id="seed"),
        gr.Slider(
            0,
            max(8, first.guidance),
            value=first.guidance,
            step=0.05,
            label="Guidance",
            visible=actions.conditional,
            elem_id="guidance",
        ),
        gr.Slider(
            0,
            max(4, first.autoguidance),
            value=first.autoguidance,
            step=0.05,
            label="Autoguidance",
            visible=actions.has_guide,
            elem_id="autoguidance",
        ),
        gr.Slider(
            1, max(100, first.steps), value=first.steps, step=1, label="Steps", elem_id="steps"
        ),
    ]


def _check_port(host: str, port: int) -> None:
    """Raise InputError when the port is in use."""
    if not port:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise InputError(
                f"--port {port}: cannot be used on {host}: {problem.strerror}; choose another"
            ) from None
