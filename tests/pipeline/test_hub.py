"""Without a network the hub's libraries are told at once, and cached copies still serve."""

import socket
import time

import datasets
import pytest
from huggingface_hub import constants

from pipeline.errors import RequestError
from pipeline.hub import REACHED_WITHIN, meet_hub
from pipeline.model.tokenizer import load_tokenizer
from pipeline.params import HubParams, ModelParams
from pipeline.published.sources import Dataset


@pytest.fixture
def asked(monkeypatch):
    """The hub's libraries as on a machine that has a network, and not asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    meet_hub.cache_clear()
    yield monkeypatch
    meet_hub.cache_clear()


@pytest.fixture(params=["closed", "silent"])
def out_of_reach(request, asked):
    """A hub whose port nobody listens on, or one that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()
        asked.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("out_of_reach")
def test_a_dataset_out_of_reach_is_told_in_five_seconds(tmp_path):
    start = time.monotonic()
    with pytest.raises(RequestError, match="a network"):
        Dataset(HubParams(dataset="nobody/nothing"), "train", tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.slow
@pytest.mark.usefixtures("out_of_reach")
def test_so_is_a_model():
    start = time.monotonic()
    with pytest.raises(RequestError, match="nobody/nothing"):
        load_tokenizer(ModelParams(name="nobody/nothing"))
    assert time.monotonic() - start < 5


def test_a_hub_that_answers_is_used(asked, tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        asked.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        meet_hub()
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE and REACHED_WITHIN < 5
