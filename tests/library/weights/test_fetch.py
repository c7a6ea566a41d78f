"""Downloads from a web server of this process: what arrives is checked, and a failure leaves nothing."""

import dataclasses
import gc
import hashlib
import http.server
import os
import re
import signal
import socket
import threading
import time

import keras
import numpy as np
import pytest
from safetensors.numpy import save

import keras_mnv2
from keras_mnv2.weights import fetch as fetching
from keras_mnv2.weights import source, table
from keras_mnv2.weights.fetch import fetch
from tests.conftest import once

NAME = "model.safetensors"
GOOD = save({"a": np.arange(50_000, dtype="float32")})
SHA256 = hashlib.sha256(GOOD).hexdigest()


class Host(http.server.ThreadingHTTPServer):
    """Answers each path as `answers` says, and keeps the paths that it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.closing = {}, [], threading.Event()

    def url(self, path, answer):
        self.answers[f"/{path}"] = answer
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address):
        pass  # A client that left is part of the tests.


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.answers.get(self.path, missing)(self)

    def log_message(self, *args):
        pass

    def start(self, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def sends(data):
    def answer(handler):
        handler.start(len(data))
        handler.wfile.write(data)

    return answer


def missing(handler):
    handler.send_error(404)


def cut(handler):
    handler.start(len(GOOD))
    handler.wfile.write(GOOD[:100_000])


def slow(handler):
    time.sleep(1)
    sends(GOOD)(handler)


def stalled(handler):
    handler.server.closing.wait(30)


def stalled_midway(handler):
    cut(handler)
    handler.server.closing.wait(30)


def interrupted(handler):
    cut(handler)
    handler.wfile.flush()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    handler.server.closing.wait(30)


@pytest.fixture
def host():
    server = Host()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of downloaded models, which is not there yet."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "keras" / "models"


def assert_one_sentence(error, *parts):
    text = str(error)
    assert text.endswith(".")
    assert not text.endswith("..")
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text), text
    for part in parts:
        assert str(part) in text


def refused(error, url, cache, sha256=None):
    """The message of the error that `fetch` raises, after which the cache is as it was."""
    before = sorted(cache.rglob("*"))
    with pytest.raises(error) as caught:
        fetch(url, NAME, sha256)
    assert_one_sentence(caught.value, url, cache / NAME)
    assert sorted(cache.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8], None])
def test_a_good_file_is_downloaded_once(sha256, host, cache):
    url = host.url("file", sends(GOOD))
    for _ in range(2):
        assert fetch(url, NAME, sha256) == cache / NAME
        assert (cache / NAME).read_bytes() == GOOD
    assert host.asked == ["/file"]
    assert sorted(os.listdir(cache)) == ([NAME] if sha256 else [NAME, f"{NAME}.sha256"])
    assert socket.getdefaulttimeout() is None


def test_a_file_of_unknown_hash_is_held_to_its_first_download(host, cache, capsys):
    url, record = host.url("file", sends(GOOD)), cache / f"{NAME}.sha256"
    fetch(url, NAME)
    assert record.read_text() == f"{SHA256}  {NAME}\n"
    fetch(url, NAME)
    assert "SHA-256" not in capsys.readouterr().out
    other = save({"a": np.ones(50_000, dtype="float32")})
    (cache / NAME).write_bytes(other)
    (line,) = told(capsys, lambda: fetch(url, NAME))
    assert SHA256 in line
    assert hashlib.sha256(other).hexdigest() in line
    assert str(record) in line
    # Downloaded again it is the first one again; another one is told of, each time.
    (cache / NAME).unlink()
    assert not told(capsys, lambda: fetch(url, NAME))
    (cache / NAME).unlink()
    host.url("file", sends(other))
    for _ in range(2):
        assert len(told(capsys, lambda: fetch(url, NAME))) == 1
    record.unlink()
    (cache / NAME).unlink()
    assert not told(capsys, lambda: fetch(url, NAME))
    assert record.read_text().startswith(hashlib.sha256(other).hexdigest())


def told(capsys, call):
    """The lines about hashes that a call prints."""
    capsys.readouterr()
    call()
    return [line for line in capsys.readouterr().out.splitlines() if "SHA-256" in line]


def test_a_slow_server_is_waited_for(host, cache):
    assert fetch(host.url("file", slow), NAME, SHA256).read_bytes() == GOOD


@pytest.mark.parametrize(("answer", "reason"), [(cut, "got only 100000 out of"), (missing, "404 -- Not Found")])
@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_download_that_fails_leaves_nothing(answer, reason, sha256, host, cache):
    assert reason in refused(ConnectionError, host.url("file", answer), cache, sha256)
    assert not os.listdir(cache)


@pytest.mark.parametrize("answer", [stalled, stalled_midway])
def test_a_stalled_server_is_given_up(answer, host, cache, monkeypatch):
    monkeypatch.setattr(fetching, "STALLED_SECONDS", 1)
    start = time.perf_counter()
    assert "timed out" in refused(ConnectionError, host.url("file", answer), cache, SHA256)
    assert time.perf_counter() - start < 10
    assert not os.listdir(cache)
    assert socket.getdefaulttimeout() is None


def test_no_server_at_all(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    assert "by hand" in refused(ConnectionError, url, cache)
    assert not os.listdir(cache)


def test_another_hash_than_the_published_one(host, cache):
    wrong = "0" * 64
    message = refused(ValueError, host.url("file", sends(GOOD)), cache, wrong)
    assert SHA256 in message
    assert wrong in message
    assert not os.listdir(cache)


@pytest.mark.parametrize("data", [b"<html>Please log in.</html>", b"", GOOD[:-1]], ids=["page", "empty", "short"])
def test_a_file_of_unknown_hash_that_is_no_weights(data, host, cache):
    assert "cannot be read as weights" in refused(ValueError, host.url("file", sends(data)), cache)
    assert not os.listdir(cache)


@once
# The signal may come where Python's `urlretrieve` has its file open, and not yet in a `with`.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_interrupted_download_leaves_nothing(host, cache):
    # A shell starts its background processes, and so this one perhaps, with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch(host.url("file", interrupted), NAME, SHA256)
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert not os.listdir(cache)
    assert socket.getdefaulttimeout() is None


def test_a_cached_file_of_another_hash_is_replaced(host, cache, capsys):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(GOOD[:-1])
    assert fetch(host.url("file", sends(GOOD)), NAME, SHA256).read_bytes() == GOOD
    assert f"{cache / NAME} has another SHA-256" in capsys.readouterr().out
    assert host.asked == ["/file"]
    assert os.listdir(cache) == [NAME]


def test_a_cached_file_of_another_hash_stays_where_its_download_fails(host, cache):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(b"older")
    refused(ConnectionError, host.url("file", cut), cache, SHA256)
    refused(ValueError, host.url("file", sends(b"other")), cache, SHA256)
    assert (cache / NAME).read_bytes() == b"older"


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_that_was_put_there_by_hand_is_used(sha256, cache):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(GOOD)
    assert fetch("http://127.0.0.1:1/nowhere", NAME, sha256) == cache / NAME


def test_a_cache_folder_that_cannot_be_written(host, cache):
    # Root may write everywhere, but nobody makes a folder where a file is.
    if os.geteuid() == 0:
        cache.parent.write_text("mine")
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o500)
    assert "KERAS_HOME" in refused(ConnectionError, host.url("file", sends(GOOD)), cache, SHA256)
    assert not host.asked
    assert os.geteuid() != 0 or cache.parent.read_text() == "mine"


def build(**arguments):
    return keras_mnv2.MobileNetV2(**{"alpha": 0.35, "dropout": 0.0, **arguments})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model and its weights as a file of torchvision's layout."""
    keras.utils.set_random_seed(1)
    model = build(input_shape=(32, 32, 3), weights=None, classes=10, padding="symmetric", norm_epsilon=1e-5)
    keras_mnv2.save_weights(model, path := tmp_path_factory.mktemp("published") / NAME, "torchvision")
    return model, path.read_bytes()


def publish(monkeypatch, name, **changes):
    """Changes a record of the table, wherever it is looked up."""
    records = [dataclasses.replace(c, **changes) if c.name == name else c for c in table.CHECKPOINTS]
    for module in (table, source):
        monkeypatch.setattr(module, "CHECKPOINTS", tuple(records))


def assert_same_weights(found, expected):
    for a, b in zip(found.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@once
def test_a_published_name_is_downloaded_and_loaded(host, cache, published, monkeypatch, rng):
    model, data = published
    name, digits = "torchvision/IMAGENET1K_V2", hashlib.sha256(data).hexdigest()
    url = host.url("models/mobilenet.safetensors", sends(data))
    publish(monkeypatch, name, url=url, sha256=digits, alpha=0.35, classes=10)
    for _ in range(2):
        found = build(input_shape=(32, 32, 3), weights=name)
        assert_same_weights(found, model)
    x = rng.uniform(-1, 1, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(found.predict(x, verbose=0), model.predict(x, verbose=0))
    assert host.asked == ["/models/mobilenet.safetensors"]
    assert os.listdir(cache) == ["mobilenet.safetensors"]


def test_a_published_name_whose_file_is_broken_makes_no_model(host, cache, published, monkeypatch):
    name, url = "torchvision/IMAGENET1K_V2", host.url("mobilenet.pth", sends(published[1][:-1]))
    publish(monkeypatch, name, url=url, alpha=0.35, classes=10)
    with pytest.raises(ValueError, match="published one is") as caught:
        build(input_shape=(32, 32, 3), weights=name)
    assert_one_sentence(caught.value, url, cache / "mobilenet.pth")
    assert not os.listdir(cache)


def test_imagenet_is_kerass_own_file(host, cache, tmp_path, monkeypatch):
    model = build(input_shape=(96, 96, 3), weights=None)
    keras_mnv2.save_weights(model, tmp_path / "weights.h5")
    record = next(c for c in table.CHECKPOINTS if c.name == "keras/mobilenet_v2_0.35_96")
    path = record.url.removeprefix("https://storage.googleapis.com/")
    publish(monkeypatch, record.name, url=host.url(path, sends((tmp_path / "weights.h5").read_bytes())))
    assert_same_weights(build(input_shape=(96, 96, 3), weights="imagenet"), model)
    assert host.asked == [f"/{path}"]
    name = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96.h5"
    assert sorted(os.listdir(cache)) == [name, f"{name}.sha256"]


@pytest.mark.parametrize(
    ("address", "path", "file_name"),
    [
        ("hf://owner/repo", "owner/repo/resolve/main/model.safetensors", "owner--repo--model.safetensors"),
        ("hf://owner/repo.b/some/file.bin", "owner/repo.b/resolve/main/some/file.bin", "owner--repo.b--some--file.bin"),
    ],
)
def test_addresses_of_the_hub(address, path, file_name, host, cache, published, monkeypatch):
    model, data = published
    url = host.url(path, sends(data))
    monkeypatch.setattr(source, "HUB", url.removesuffix(path))
    assert_same_weights(build(input_shape=(32, 32, 3), weights=address), model)
    assert host.asked == [f"/{path}"]
    assert sorted(os.listdir(cache)) == [file_name, f"{file_name}.sha256"]


def test_a_repository_that_is_not_there(host, cache, monkeypatch):
    monkeypatch.setattr(source, "HUB", host.url("", missing))
    url = f"{source.HUB}owner/repo/resolve/main/model.safetensors"
    with pytest.raises(ConnectionError, match="404") as caught:
        build(input_shape=(32, 32, 3), weights="hf://owner/repo")
    assert_one_sentence(caught.value, url, cache / "owner--repo--model.safetensors")
    assert not os.listdir(cache)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://owner", "hf://a b/c", "hf://owner/repo/", "hf://a/b/../c", "hf://a/../b"]
)
def test_a_malformed_address_of_the_hub(address, cache):
    with pytest.raises(ValueError, match="hf://OWNER/REPOSITORY") as caught:
        build(input_shape=(32, 32, 3), weights=address)
    assert_one_sentence(caught.value, repr(address))
    assert not cache.exists()


def test_a_table_record_is_found_by_its_hub_address():
    address = "hf://timm/mobilenetv2_100.ra_in1k"
    assert source.checkpoint_of(address).name == "timm/mobilenetv2_100.ra_in1k"
