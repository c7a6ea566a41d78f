"""The page of `format="web"`, in headless Chromium from a static server."""

import base64
import functools
import http.server
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

import keras_mnv2
from keras_mnv2.formats import web
from tests.conftest import once_on
from tests.exports import small
from tests.helpers import note
from tests.training.report.browser import Browser

NAMES = ["<b>shirt</b>", "štěně", "a & b", "hat", "dress"]


@pytest.fixture(scope="module")
def served(decided, tmp_path_factory):
    """A page's folder and its address; the model takes images of 32 pixels."""
    needed = "This test needs npm and a network, for onnxruntime-web, or KERAS_MNV2_ONNXRUNTIME_WEB."
    assert shutil.which("npm") or os.environ.get(web.VARIABLE), needed
    folder = tmp_path_factory.mktemp("web") / "page"
    report = keras_mnv2.export(decided[0], folder, "web", labels=NAMES, verbose=False)
    assert report.largest_difference < 1e-4
    assert report.size == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def browser(tmp_path):
    # A camera of its own, which shows a clock.
    camera = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"
    with Browser(tmp_path / "profile", *camera) as opened:
        yield opened


MODULE = "const page = await import('./page.js'); await page.ready;"


def in_page(browser, code):
    return browser.run(f"(async () => {{ {MODULE} {code} }})()")


def photographs(count):
    """PNG files, whose pixels each reader gives alike, wide and high, smaller and larger than the model's images."""
    rng = np.random.default_rng(2)
    for i in range(count):
        height, width = rng.integers(20, 180, 2)
        coarse = rng.integers(0, 256, (5, 4, 3), "uint8")
        yield Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC if i % 2 else 0)


@once_on("torch")
def test_the_page_says_what_predict_says(served, browser, decided):
    model = decided[0]
    _, address = served
    browser.open(address, 390)
    largest = 0.0
    for picture in photographs(20):
        file = io.BytesIO()
        picture.save(file, "png")
        text = base64.b64encode(file.getvalue()).decode()
        code = (
            f"const blob = new Blob([Uint8Array.from(atob('{text}'), c => c.charCodeAt(0))], {{type: 'image/png'}});"
            "const bitmap = await createImageBitmap(blob, {colorSpaceConversion: 'none'});"
            "const pixels = page.prepare(bitmap, bitmap.width, bitmap.height);"
            "return [Array.from(pixels), (await page.classify(pixels)).scores];"
        )
        pixels, scores = in_page(browser, code)
        expected = keras_mnv2.resize_and_crop(picture, keras_mnv2.Preprocessing.for_evaluation(32))
        # Here and there Pillow rounds to the other level.
        found = np.reshape(pixels, expected.shape)
        assert np.abs(found - expected.astype(int)).max() <= 1
        assert (found != expected).mean() < 0.03
        mine, pillows = model.predict(np.stack([found, expected]).astype("float32"), verbose=0)
        assert np.argmax(scores) == pillows.argmax()
        largest = max(largest, np.abs(scores - mine).max())
    assert largest < 1e-3
    note("the page's scores: largest difference", largest)
    # Nothing but files of the folder was asked for.
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith((address, "data:", f"blob:{address}")) for url in asked)
    assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


@once_on("torch")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_dropped_photograph_is_named(served, browser, width, scheme):
    _, address = served
    browser.open(address, width, scheme=scheme)
    in_page(browser, "")
    # By the keyboard: the first two stops are the file and the camera.
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "file"
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "use-camera"
    code = (
        "const canvas = new OffscreenCanvas(200, 100); const c = canvas.getContext('2d'); c.fillStyle = 'teal';"
        "c.fillRect(0, 0, 90, 90); const blob = await canvas.convertToBlob();"
        "const given = new DataTransfer(); given.items.add(new File([blob], 'a.png', {type: 'image/png'}));"
        "dispatchEvent(new DragEvent('drop', {dataTransfer: given, cancelable: true}));"
        "while (!document.querySelector('#best li')) await new Promise(done => setTimeout(done, 20));"
        "return Array.from(document.querySelectorAll('#best li span:first-child'), e => e.textContent);"
    )
    assert sorted(in_page(browser, code)) == sorted(NAMES)
    assert browser.run("document.querySelector('#best b')") is None
    assert browser.run("document.getElementById('photograph').alt") == "The photograph a.png"
    assert browser.run("/^\\d+ ms/.test(document.getElementById('time').textContent)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    in_page(browser, "await page.classifyFile(new File(['no'], 'no.png'));")
    assert "no.png is no photograph" in browser.run("document.getElementById('status').textContent")


@once_on("torch")
def test_the_camera_is_classified_until_it_stops(served, browser):
    browser.open(served[1], 390)
    button = "document.getElementById('use-camera')"
    code = (
        f"{button}.click();"
        "while (!document.querySelector('#best li')) await new Promise(done => setTimeout(done, 20));"
        "return document.getElementById('status').textContent;"
    )
    assert in_page(browser, code) == "The camera is on."
    assert browser.run("document.querySelectorAll('#best li').length") == 5
    track = "document.querySelector('video').srcObject.getTracks()[0]"
    assert browser.run(f"window.track = {track}, window.track.readyState") == "live"
    in_page(browser, f"{button}.click();")
    assert browser.run("window.track.readyState") == "ended"
    assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


@once_on("torch")
def test_the_page_is_told_how_photographs_are_prepared(served):
    about = json.loads((served[0] / "about.json").read_text("utf-8"))
    assert (about["size"], about["resize"], about["mean"], about["labels"]) == (32, 36, [0.0] * 3, NAMES)
    assert "default-src 'none'" in (served[0] / "index.html").read_text()


def test_what_a_page_cannot_show_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r'model must give scores \(batch, classes\) for format="web", got'):
        keras_mnv2.export(small(include_top=False), tmp_path / "page", "web")
    with pytest.raises(ValueError, match='model must take square RGB images for format="web"'):
        keras_mnv2.export(small(input_shape=(32, 64, 3)), tmp_path / "page", "web")
    monkeypatch.setenv(web.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ImportError, match=r"must be the folder of the npm package onnxruntime-web, got '.*nowhere'"):
        keras_mnv2.export(small(), tmp_path / "page", "web")
    monkeypatch.delenv(web.VARIABLE)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r"npm install onnxruntime-web@1\.30\.0, or set KERAS_MNV2_ONNXRUNTIME_WEB"):
        keras_mnv2.export(small(), tmp_path / "page", "web")
    package = tmp_path / "node_modules" / "onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.17.0"}')
    for name in web.RUNTIME:
        (package / "dist" / name).touch()
    with pytest.raises(ImportError, match=r"needs onnxruntime-web 1\.30\.0, got 1\.17\.0 in"):
        keras_mnv2.export(small(), tmp_path / "page", "web")
    assert not (tmp_path / "page").exists()
