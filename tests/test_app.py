"""The page: what it asks of a model, and the page itself in a real browser."""

import base64
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from r2id.app.actions import MOST_PIXELS, Actions, DrawRequest, mask_of
from r2id.app.page import build
from r2id.config import change
from r2id.errors import InputError
from r2id.pipeline import Pipeline
from tests.waiting import free_port, wait_until

WISH = DrawRequest(seed=3, guidance=1.5, steps=3, autoguidance=0.5, label=4)


def pixels(picture):
    return np.asarray(picture).astype(int)


def grey(content: bytes) -> np.ndarray:
    """The pixels of a picture's file, in grey."""
    return pixels(Image.open(io.BytesIO(content)).convert("L"))


@pytest.fixture(scope="module")
def actions(r2id_run):
    return Actions(Pipeline.from_pretrained(r2id_run, device="cpu"))


def test_a_picture_is_drawn_once_and_shown_at_any_size(actions, monkeypatch):
    drawn = actions.draw(WISH, (8, 8))
    settings = {"guidance": 1.5, "autoguidance": 0.5, "steps": 3}
    expected = actions.pipe(4, seeds=3, size=(8, 8), **settings)[0]
    assert np.array_equal(pixels(drawn), pixels(expected))

    def never(*arguments, **settings):
        raise AssertionError("latents are drawn again")

    with monkeypatch.context() as patched:
        patched.setattr(type(actions.pipe.sampler), "latents", never)
        assert actions.draw(WISH, (40, 24)).size == (24, 40)
        with pytest.raises(AssertionError, match="again"):
            actions.draw(replace(WISH, seed=4), (8, 8))


def test_all_settings_of_a_request_reach_the_picture(actions):
    drawn = pixels(actions.draw(WISH, (8, 8)))
    changes = {"seed": 4, "guidance": 3.0, "steps": 2, "autoguidance": 2.0, "label": 7}
    for name, value in changes.items():
        other = pixels(actions.draw(replace(WISH, **{name: value}), (8, 8)))
        assert not np.array_equal(other, drawn), name


def test_sliders_reach_what_the_model_was_trained_with(actions):
    pytest.importorskip("gradio")
    defaults = {"guidance": 20.0, "autoguidance": 6.0, "steps": 250}
    sampler = actions.pipe.sampler
    sampler = replace(sampler, defaults=change(sampler.defaults, defaults))
    page = build(Actions(Pipeline(sampler)), "a model")
    sliders = {
        block.elem_id.replace("-", "_"): block
        for block in page.blocks.values()
        if getattr(block, "elem_id", None)
    }
    for name, value in defaults.items():
        assert sliders[name].value == value <= sliders[name].maximum, name


def test_a_zoomed_view_is_a_window_of_the_large_picture(actions):
    view = actions.zoom(WISH, (10, 8), 4, (0.5, 0.0))
    assert view.size == (410, 512)
    whole = pixels(actions.draw(WISH, (2048, 1640)))
    assert np.abs(whole[768:1280, :410] - pixels(view)).max() <= 1
    with pytest.raises(InputError, match="zoom 100"):
        actions.zoom(WISH, (8, 8), 100, (0.5, 0.5))


def test_latents_that_are_kept_are_bounded(actions):
    kept = Actions(actions.pipe)
    for seed in range(70):
        kept._latents[("old", seed)] = torch.zeros(1)
    kept.draw(WISH, (8, 8))
    assert len(kept._latents) == 64


def test_a_gallery_shows_its_sizes(actions):
    shown = actions.gallery(WISH)
    assert len(shown) > 4
    for picture, caption in shown:
        assert caption == f"{picture.height} × {picture.width}"


def test_uploads_are_pictures_of_a_bearable_size(actions, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (30, 20), (200, 30, 40)).save(file)
    picture = actions.upload(str(file))
    assert picture.mode == "L" and picture.size == (30, 20)
    latents, drawn, error, words = actions.autoencode(picture, (40, 60))
    assert drawn.size == (60, 40) and error.size == (30, 20) and min(latents.size) > 60
    assert re.search(r"20 × 30 pixels are 10 × 15 latent cells of \d+ channels", words)
    file.write_text("not a picture")
    with pytest.raises(InputError, match="cannot be used"):
        actions.upload(str(file))
    Image.new("1", (10_000, MOST_PIXELS // 10_000 + 1)).save(file)
    with pytest.raises(InputError, match=f"more than the {MOST_PIXELS}"):
        actions.upload(str(file))


def test_paint_is_what_is_not_transparent():
    layers = [np.zeros((4, 5, 4), dtype=np.uint8) for _ in range(2)]
    layers[0][1, 2, 3], layers[1][3, 4, 3] = 255, 1
    assert np.argwhere(pixels(mask_of(layers))).tolist() == [[1, 2], [3, 4]]


@pytest.fixture(scope="module")
def address(r2id_run, tmp_path_factory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'r2id[app]'")
    command = [sys.executable, "-m", "r2id.cli", "app", str(r2id_run), "--port", str(free_port())]
    folder = tmp_path_factory.mktemp("page")
    with subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().strip()
            assert server.poll() is None, "the server is still up"
        finally:
            server.terminate()
    assert server.returncode == 0 and not any(folder.iterdir()), "nothing is left behind"


class Browser:
    """The page in a browser."""

    def __init__(self, address: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,1300",
        ):
            options.add_argument(argument)
        options.binary_location = str(shutil.which("chromium"))
        self.driver = webdriver.Chrome(
            options=options, service=Service(str(shutil.which("chromedriver")))
        )
        self.driver.get(address)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def wait(self, what: str, found: Callable[[], Any]) -> Any:
        """Wait until something is there, and return it."""

        def looked_at() -> Any:
            # Not on the page yet, or replaced while it was looked at.
            with contextlib.suppress(Exception):
                return found()

        return wait_until(looked_at, 180, said=lambda: f"not on the page: {what}", every=0.1)

    def click(self, selector: str) -> None:
        self.wait(selector, lambda: self.find(selector).is_displayed())
        self.find(selector).click()

    def begin(self, tab: int = 0) -> None:
        """Load the page anew, and open one of its tabs when the first picture is drawn."""
        self.driver.refresh()
        self.picture("picture", (128, 128))
        self.driver.find_elements("css selector", "button[role=tab]")[tab].click()

    def type(self, name: str, value: object, leave: bool = True) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"#{name} input[type=number]")
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, str(value), Keys.TAB if leave else "")

    def any_picture(self, name: str) -> np.ndarray:
        """Wait for the picture of an element, and return its pixels, in grey."""
        script = (
            "const image = document.querySelector(arguments[0]);"
            "if (!image || !image.complete) return null;"
            "const canvas = document.createElement('canvas');"
            "canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;"
            "canvas.getContext('2d').drawImage(image, 0, 0);"
            "return canvas.toDataURL('image/png')"
        )
        address = self.wait(name, lambda: self.driver.execute_script(script, f"#{name} img"))
        return grey(base64.b64decode(address.partition(",")[2]))

    def wait_for_stillness(self, canvas: Any) -> None:
        """Wait until a canvas has its picture."""
        seen = None

        def is_still() -> bool:
            nonlocal seen
            before, seen = seen, grey(canvas.screenshot_as_png)
            same = before is not None and np.array_equal(before, seen)
            return same and len(np.unique(seen)) > 16  # without a picture it has few colours

        self.wait("the canvas's picture", is_still)

    def picture(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Wait for the picture of an element to have a height and width."""

        def read() -> list[np.ndarray] | None:
            found = self.any_picture(name)
            return [found] if found.shape == size else None

        return self.wait(f"{name} of {size}", read)[0]


@pytest.fixture(scope="module")
def browser(address) -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="the page is tested by selenium")
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"the page is tested in {program}, which is not installed")
    opened = Browser(address)
    yield opened
    opened.driver.quit()


@pytest.mark.slow
def test_the_page(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    square = browser.picture("picture", (128, 128))
    browser.type("width", 64)
    narrow = browser.picture("picture", (128, 64))
    difference = square.reshape(128, 64, 2).mean(2) - narrow
    assert np.sqrt((difference**2).mean()) < 20, "the same picture in another ratio"
    browser.type("zoom", 4)
    view = browser.picture("window", (512, 256))
    assert np.sqrt(((view[::16, ::16] - narrow[48:80, 24:40]) ** 2).mean()) < 20, "its middle"

    browser.driver.find_elements("css selector", "button[role=tab]")[1].click()
    browser.click("#begin")
    canvas = browser.wait("the canvas", lambda: browser.find("#canvas canvas"))
    browser.wait_for_stillness(canvas)
    stroke = ActionChains(browser.driver).move_to_element_with_offset(canvas, -30, -10)
    stroke.click_and_hold().move_by_offset(60, 20).move_by_offset(-50, 5).release().perform()
    browser.click("#inpaint")
    drawn = browser.picture("result", (128, 128))
    changed = drawn != square
    assert 0.005 < changed.mean() < 0.5, "only what is painted over"
    rows, columns = np.nonzero(changed)
    assert rows.min() > 20 and rows.max() < 108 and columns.min() > 20 and columns.max() < 108

    browser.click("#outpaint")
    assert np.array_equal(browser.picture("result", (128, 256))[:, 64:192], square)

    wrong = tmp_path / "wrong.png"
    wrong.write_text("not a picture")
    browser.find("#upload input[type=file]").send_keys(str(wrong))
    said = browser.wait("a message", lambda: browser.find(".toast-body").text)
    assert "this file cannot be used: not an image" in said
    browser.driver.refresh()
    browser.picture("picture", (128, 128))


@pytest.mark.slow
def test_a_picture_too_large_to_be_grown_is_told(browser, tmp_path):
    browser.begin(tab=1)
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 20), (200, 30, 40)).save(large)
    browser.find("#upload input[type=file]").send_keys(str(large))
    grow = browser.find("#outpaint")
    browser.wait("what cannot be done", lambda: "above 2048 pixels cannot be grown" in grow.text)
    assert not grow.is_enabled()
    browser.click("#begin")
    browser.wait("growing", lambda: grow.is_enabled() and grow.text == "Grow to the new size")


@pytest.mark.slow
def test_a_zoomed_part_is_of_the_picture_that_is_shown(browser, actions):
    browser.begin()
    browser.type("zoom", 2)
    browser.picture("window", (512, 512))
    browser.click("#next-seed")
    request = replace(actions.first_request, seed=1)
    wanted = pixels(actions.zoom(request, (128, 128), 2, (0.5, 0.5)))
    browser.wait("its part", lambda: np.array_equal(browser.any_picture("window"), wanted))


@pytest.mark.slow
def test_small_pictures_are_shown_large(browser, tmp_path):
    browser.begin(tab=2)
    small = tmp_path / "small.png"
    Image.new("L", (14, 12), 90).save(small)
    browser.find("#encode input[type=file]").send_keys(str(small))
    for name in ("reconstruction", "error"):
        browser.picture(name, (12, 14))
        assert browser.find(f"#{name} img").size["height"] > 100


@pytest.mark.slow
def test_a_number_counts_when_it_is_typed(browser, actions):
    from selenium.webdriver.common.keys import Keys

    browser.driver.refresh()
    browser.picture("picture", (128, 128))
    request = replace(actions.first_request, steps=2)

    def wait_for_picture(**change: int) -> None:
        wanted = pixels(actions.draw(replace(request, **change), (128, 128)))
        browser.wait(f"{change}", lambda: np.array_equal(browser.any_picture("picture"), wanted))

    for name, number in (("steps", 2), ("seed", 7)):
        browser.type(name, Keys.BACKSPACE, leave=False)
        browser.type(name, number)
        wait_for_picture(**{name: number})  # a request for half of the number would come before
        assert not browser.driver.find_elements("css selector", ".toast-body"), name
    browser.click("#next-seed")
    wait_for_picture(seed=8)
    browser.type("width", Keys.BACKSPACE)
    browser.picture("picture", (128, 1))
    assert not browser.driver.find_elements("css selector", ".toast-body")


@pytest.mark.slow
def test_ten_clients_at_once_are_served(address, actions):
    from gradio_client import Client

    def draw(seed: int) -> np.ndarray:
        file = Client(address, verbose=False).predict(
            8, 12, 4, [], seed, 1.5, 0.5, 3, api_name="/draw"
        )
        return pixels(Image.open(file))

    with ThreadPoolExecutor(10) as clients:
        drawn = list(clients.map(draw, range(10)))
    for seed, picture in enumerate(drawn):
        request = DrawRequest(seed=seed, guidance=1.5, autoguidance=0.5, steps=3, label=4)
        assert np.array_equal(picture, pixels(actions.draw(request, (8, 12)))), "each its own"


def test_it_listens_on_this_machine_alone(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    open_ports = [
        connection.laddr
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert {place.ip for place in open_ports} == {"127.0.0.1"}


def test_a_port_in_use_is_named(address, r2id_run, r2id):
    port = address.rstrip("/").rpartition(":")[2]
    code, _, errors = r2id("app", r2id_run, "--port", port)
    assert code == 2 and f"--port {port}" in errors and "in use" in errors


def test_the_page_needs_a_model(r2id, tmp_path):
    code, _, errors = r2id("app", tmp_path / "nothing")
    assert code == 2 and "nothing" in errors and len(errors.splitlines()) == 1
