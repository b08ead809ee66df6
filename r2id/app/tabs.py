"""The tabs of the page: draw, edit, autoencoder. Each lays out its controls and says what they do.

``gr`` is Gradio; ``controls`` are the controls of what is drawn, in the order of ``_request``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from r2id.app.actions import LARGEST, Actions, DrawRequest, mask_of
from r2id.errors import InputError, WorkError
from r2id.models.coords import Size

_SEED = 2
"""Place of the seed among the controls of what is drawn."""
Messages = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Decorates what is done on the page; see messages_of."""


def draw_tab(
    gr: Any, page: Any, actions: Actions, controls: list[Any], messages: Messages, first: Size
) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            height = gr.Slider(1, LARGEST, value=first[0], step=1, label="Height", elem_id="height")
            width = gr.Slider(1, LARGEST, value=first[1], step=1, label="Width", elem_id="width")
            zoom = gr.Slider(
                1, 64, value=1, step=0.5, label="Zoom (click into the picture)", elem_id="zoom"
            )
            again = gr.Button("Next seed", elem_id="next-seed")
            many = gr.Button("At many sizes", elem_id="many-sizes")
        with gr.Column(scale=2):
            picture = gr.Image(
                label="Picture",
                type="pil",
                format="png",
                height=512,
                interactive=False,
                elem_id="picture",
                elem_classes="drawn",
                buttons=["download", "fullscreen"],
            )
            window = gr.Image(
                label="Zoomed",
                type="pil",
                format="png",
                interactive=False,
                visible=False,
                elem_id="window",
                elem_classes="drawn",
            )
    gallery = gr.Gallery(
        label="One seed, many sizes",
        visible=False,
        elem_id="gallery",
        columns=7,
        height=190,
        object_fit="contain",
    )
    centre = gr.State((0.5, 0.5))
    model = {"concurrency_id": "model", "show_progress": "minimal"}

    @messages
    def draw(high: float, wide: float, *values: Any) -> Any:
        if values[_SEED] is None:  # the field is empty until a number is typed
            return gr.skip()
        return actions.draw(_request(*values), (int(high), int(wide)))

    @messages
    def look(factor: float, middle: Any, high: float, wide: float, *values: Any) -> Any:
        if factor <= 1:
            return gr.update(visible=False)
        if values[_SEED] is None:
            return gr.skip()
        seen = actions.zoom(_request(*values), (int(high), int(wide)), factor, middle)
        return gr.update(value=seen, visible=True)

    def aim(high: float, wide: float, factor: float, event: Any) -> Any:
        x, y = event.index
        return (y / max(1, high), x / max(1, wide)), max(factor, 4)

    # Gradio looks for this type; it is imported here, where an annotation's text is not resolved.
    aim.__annotations__["event"] = gr.SelectData

    @messages
    def show_many(*values: Any) -> Any:
        return gr.update(value=actions.gallery(_request(*values)), visible=True)

    drawn = {"fn": draw, "inputs": [height, width, *controls], "outputs": picture, **model}
    # Numbers count when they are complete, not at each change: half of one may be none.
    events = {gr.Dropdown: ("change",), gr.Number: ("submit", "blur"), gr.Slider: ("release",)}
    chosen = [
        getattr(control, event)
        for control in (height, width, *controls)
        for event in events[type(control)]
    ]
    seen = {
        "fn": look,
        "inputs": [zoom, centre, height, width, *controls],
        "outputs": window,
        **model,
    }
    gr.on([page.load, *chosen], **drawn, trigger_mode="always_last").then(**seen)
    seed = controls[_SEED]
    following = again.click(lambda number: int(number or 0) + 1, seed, seed, show_progress="hidden")
    following.then(**drawn).then(**seen)
    zoom.release(**seen, trigger_mode="always_last")
    picture.select(aim, [height, width, zoom], [centre, zoom], show_progress="hidden").then(**seen)
    many.click(show_many, controls, gallery, **model)


def edit_tab(
    gr: Any, actions: Actions, controls: list[Any], messages: Messages, first: Size
) -> None:
    with gr.Row():
        with gr.Column():
            upload = gr.File(
                label="Upload a picture",
                file_count="single",
                type="filepath",
                height=120,
                elem_id="upload",
            )
            start = gr.Button("Begin with a drawn picture", elem_id="begin")
            canvas = gr.ImageMask(
                label="Paint over what is to be drawn anew",
                type="numpy",
                image_mode="RGBA",
                format="png",
                sources=(),
                brush=gr.Brush(default_size=12, colors=["#ff2020"], color_mode="fixed"),
                transforms=(),
                layers=False,
                elem_id="canvas",
            )
        with gr.Column():
            fill = gr.Button("Draw the painted part", variant="primary", elem_id="inpaint")
            with gr.Row(equal_height=True):
                high = gr.Slider(
                    1, LARGEST, value=first[0], step=1, label="New height", elem_id="new-height"
                )
                wide = gr.Slider(
                    1, LARGEST, value=2 * first[1], step=1, label="New width", elem_id="new-width"
                )
            growing = "Grow to the new size"
            grow = gr.Button(growing, elem_id="outpaint")
            strength = gr.Slider(0.05, 1, value=0.5, step=0.05, label="Strength of the variation")
            change = gr.Button("Vary", elem_id="vary")
            result = gr.Image(
                label="Result",
                type="pil",
                format="png",
                height=512,
                interactive=False,
                elem_id="result",
                elem_classes="drawn",
                buttons=["download", "fullscreen"],
            )
            keep = gr.Button("Go on with the result", elem_id="go-on")
    # The picture as it is, since the canvas may show it in other colours or at another size.
    held = gr.State(None)
    model = {"concurrency_id": "model", "show_progress": "minimal"}

    def taken(picture: Any) -> Any:
        """Show a picture on the canvas, and offer to grow it to twice its width.

        The sliders have no size that a larger picture than theirs could be grown to.
        """
        if picture is None:
            return None, None, gr.skip(), gr.skip(), gr.skip()
        can_grow = max(picture.size) <= LARGEST
        text = growing if can_grow else f"Pictures above {LARGEST} pixels cannot be grown here"
        size = min(LARGEST, picture.height), min(LARGEST, 2 * picture.width)
        button = gr.update(value=text, interactive=can_grow)
        return picture, picture.convert("RGBA"), *size, button

    @messages
    def take_file(path: str | None) -> Any:
        return taken(None if path is None else actions.upload(path))

    @messages
    def take_drawn(*values: Any) -> Any:
        return taken(actions.draw(_request(*values), first))

    @messages
    def take_result(picture: Any) -> Any:
        return taken(held_or_refused(picture))

    def held_or_refused(picture: Any) -> Any:
        if picture is None:
            raise InputError("there is no picture yet: upload one, or begin with a drawn one")
        return picture

    @messages
    def inpaint(picture: Any, painted: dict[str, Any] | None, *values: Any) -> Any:
        picture = held_or_refused(picture)
        layers = (painted or {}).get("layers") or []
        if not layers:
            raise InputError("nothing is painted: paint over what is to be drawn anew")
        mask = mask_of(layers)
        if mask.size != picture.size:
            mask = mask.resize(picture.size)
        return actions.inpaint(picture, mask, _request(*values))

    @messages
    def outpaint(picture: Any, height: float, width: float, *values: Any) -> Any:
        return actions.outpaint(
            held_or_refused(picture), (int(height), int(width)), _request(*values)
        )

    @messages
    def vary(picture: Any, amount: float, *values: Any) -> Any:
        return actions.vary(held_or_refused(picture), amount, _request(*values))

    begun = [held, canvas, high, wide, grow]
    upload.change(take_file, upload, begun, **model)
    start.click(take_drawn, controls, begun, **model)
    fill.click(inpaint, [held, canvas, *controls], result, **model)
    grow.click(outpaint, [held, high, wide, *controls], result, **model)
    change.click(vary, [held, strength, *controls], result, **model)
    keep.click(take_result, result, begun, show_progress="hidden")


def autoencoder_tab(gr: Any, actions: Actions, messages: Messages) -> None:
    with gr.Row():
        with gr.Column():
            upload = gr.File(
                label="Upload a picture", file_count="single", type="filepath", elem_id="encode"
            )
            height = gr.Slider(0, LARGEST, value=0, step=1, label="Height (0: its own)")
            width = gr.Slider(0, LARGEST, value=0, step=1, label="Width (0: its own)")
            words = gr.Markdown(elem_id="encoded")
        shown = [
            gr.Image(
                label=label,
                type="pil",
                format="png",
                height=320,
                interactive=False,
                elem_classes="drawn",
                elem_id=name,
            )
            for label, name in (
                ("Latents, in three colours", "latents"),
                ("Reconstruction", "reconstruction"),
                ("Error, four times", "error"),
            )
        ]

    @messages
    def encode(path: str | None, high: float, wide: float) -> Any:
        if path is None:
            return None, None, None, ""
        picture = actions.upload(path)
        size = int(high) or picture.height, int(wide) or picture.width
        return actions.autoencode(picture, size)

    for trigger in (upload.change, height.release, width.release):
        trigger(
            encode,
            [upload, height, width],
            [*shown, words],
            concurrency_id="model",
            show_progress="minimal",
        )


def _request(
    label: int | None,
    attributes: list[str] | None,
    seed: float,
    guidance: float,
    autoguidance: float,
    steps: float,
) -> DrawRequest:
    if seed is None or seed < 0:
        raise InputError(f"seed {seed}: must be a whole number from 0")
    return DrawRequest(
        int(seed), float(guidance), int(steps), float(autoguidance), label, tuple(attributes or ())
    )


def messages_of(error: Callable[..., Exception]) -> Messages:
    """Return a decorator that turns what is wrong into a message on the page."""

    def decorate(action: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(action)
        def wrapped(*values: Any) -> Any:
            try:
                return action(*values)
            except (InputError, WorkError) as wrong:
                raise error(str(wrong), print_exception=False) from None
            except MemoryError:
                raise error("there is not enough memory for this", print_exception=False) from None

        return wrapped

    return decorate
