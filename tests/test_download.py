"""The download: whatever a server, a disk or a signal does, the files end up identical, or the reason is one line."""

import contextlib
import http.server
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT, error_of, random_tensors, run, write_checkpoint

import utils

DATA = "model.ckpt.data-00000-of-00001"
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", DATA]
HPARAMS = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 4, "n_head": 2, "n_layer": 2}

# ---- A server that can go wrong -------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/models/124M/")
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        server.requests.append((name, start))
        with contextlib.suppress(ConnectionError):
            self.answer(server.files[name], start, **next(server.faults.get(name, iter(())), {}))

    def answer(self, body, start, status=206, length=None, content_range="bytes {}-{}/{}", more=b"", n=None, stall=False):
        """A good server's answer, if nothing else is wanted. n: only so many bytes of it, and the connection ends."""
        if status == 206 and start >= len(body):
            status, content_range = 416, "bytes */{2}"
        piece = (body[start:] if status == 206 else body if status == 200 else b"") + more
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", len(piece) if length is None else length)
        if content_range and status in (206, 416):
            self.send_header("Content-Range", content_range.format(start, len(body) - 1, len(body)))
        self.end_headers()
        for at in range(0, len(piece[:n]), 2**14):
            self.server.send(self.wfile, piece[:n][at : at + 2**14])
        if stall:
            self.server.go.wait()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves files under /models/124M/. faults: {name: iterator of options for Handler.answer}.

    It also has the folder they are to come into, and notes the pauses between tries.
    """

    def __init__(self, files, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.folder, self.faults, self.requests, self.pauses = dict(files), folder, {}, [], []
        self.left, self.stopped, self.go = 10**12, threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/models"

    def send(self, to, piece):
        """Once no byte is left to be sent, stop until go is set. Other requests are then served to the end."""
        to.write(piece[: self.left])
        if len(piece) > self.left:
            piece, self.left = piece[self.left :], 10**12
            self.stopped.set()
            self.go.wait()
            to.write(piece)
        self.left -= len(piece)

    def asked(self):
        """The requests since the last call: [(name, from which byte on)]."""
        asked, self.requests = self.requests, []
        return asked

    def fill(self, name, part=None):
        """Put all files but one into the folder, and of that one a part."""
        for other in FILES:
            (self.folder / other).write_bytes(self.files[other])
        (self.folder / name).unlink()
        if part is not None:
            (self.folder / f"{name}.part").write_bytes(part)

    def download(self):
        utils.download_gpt2_files("124M", self.folder)

    def load(self):
        return utils.load_encoder_hparams_and_params("124M", self.folder.parent)

    def assert_whole(self):
        assert {path.name: path.read_bytes() == self.files[path.name] for path in self.folder.iterdir()} == {
            name: True for name in FILES
        }


@pytest.fixture(scope="session")
def released(tmp_path_factory, vocabulary):
    """{name: bytes}: a tiny model with the released vocabulary, to be served as 124M."""
    folder = tmp_path_factory.mktemp("released")
    write_checkpoint(folder, HPARAMS, random_tensors(HPARAMS))
    return {name: ((vocabulary if name in FILES[:2] else folder) / name).read_bytes() for name in FILES}


@pytest.fixture
def server(released, tmp_path, monkeypatch):
    """The server, GPT2_MODELS_URL, no pauses between tries, and no patience with a server."""
    (tmp_path / "models/124M").mkdir(parents=True)
    server, send = Server(released, tmp_path / "models/124M"), requests.adapters.HTTPAdapter.send

    def impatient_send(self, request, **options):
        assert max(options["timeout"]) <= 60
        return send(self, request, **{**options, "timeout": (1, 0.3)})

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", impatient_send)
    monkeypatch.setattr(time, "sleep", server.pauses.append)
    monkeypatch.setenv("GPT2_MODELS_URL", server.url)
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


# ---- When all goes well, and parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_all_files(server, monkeypatch, capfd, slash):
    monkeypatch.setenv("GPT2_MODELS_URL", server.url + slash)
    server.download()
    assert server.asked() == [(name, 0) for name in FILES] and not server.pauses
    assert capfd.readouterr() == ("", f"fetching 124M, 498 MB, from {server.url}/124M\n")  # bars are for terminals
    server.download()
    assert server.asked() == []
    server.assert_whole()


def test_the_command_downloads_checks_and_runs(server):
    args = ["Once", "--n_tokens_to_generate", "3", "--models_dir", server.folder.parent]
    first, second = run(*args), run(*args)
    assert first.stderr == f"fetching 124M, 498 MB, from {server.url}/124M\nchecking 124M …\n"
    assert [name for name, _ in server.asked()] == FILES
    assert (first.returncode, second.returncode, second.stdout, second.stderr) == (0, 0, first.stdout, "")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [None, 0, 0.5, 1])
def test_only_what_is_missing_is_fetched(server, name, share):
    size = int((share or 0) * len(server.files[name]))
    server.fill(name, None if share is None else server.files[name][:size])
    server.download()
    assert server.asked() == [(name, size)]
    server.assert_whole()


@pytest.mark.parametrize("size", [0, 1, 400_000, -1])
def test_a_data_file_that_ends_early_is_resumed(server, size):
    server.fill(DATA)
    (server.folder / DATA).write_bytes(server.files[DATA][:size])
    server.load()
    assert server.asked() == [(DATA, size % len(server.files[DATA]))]
    assert (server.folder / DATA).read_bytes() == server.files[DATA]


@pytest.mark.parametrize(("name", "fault"), [(DATA, {}), (DATA, {"status": 200}), ("hparams.json", {})])
def test_a_part_that_is_too_long_is_dropped(server, name, fault):
    server.fill(name, server.files[name] + b"more")
    server.faults[name] = iter([fault])
    server.download()
    server.assert_whole()


def test_a_part_of_another_data_file_is_not_believed(server):
    server.fill(DATA, b"x" * 1000)
    with pytest.raises(ValueError, match="data-00000-of-00001"):
        server.load()
    (server.folder / DATA).unlink()  # as the message says
    server.load()
    assert (server.folder / DATA).read_bytes() == server.files[DATA]


def test_a_server_that_understates_the_length(server):
    """A data file that is too short is an error, not weights; the next run fetches the rest."""
    server.faults[DATA] = iter([{"status": 200, "n": 1000, "length": 1000}])
    with pytest.raises((ValueError, OSError), match=f"{DATA}.*1000"):
        server.load()
    server.asked()
    server.load()
    assert server.asked() == [(DATA, 1000)]


# ---- Faults on the way ----------------------------------------------------------------------------------------------

HANG_UP = {"status": 444, "length": 0}
PASSING = {  # what goes wrong at byte 100000, and where the next request may begin (none: there is no need for one)
    "hang up": ({"status": None}, [100_000]),
    "dropped at once": ({"n": 0}, [100_000]),
    "dropped": ({"n": 300_000}, range(380_000, 400_001)),
    "dropped, no length": ({"n": 300_000, "length": False}, [400_000]),
    "stalled": ({"n": 300_000, "stall": True}, range(380_000, 400_001)),
    "500": ({"status": 500, "more": b"some page"}, [100_000]),
    "503": ({"status": 503}, [100_000]),
    "lying range": ({"content_range": "bytes 0-9/10"}, [100_000]),
    "range from 99999 on": ({"content_range": "bytes 99999-999999/1000000"}, [100_000]),
    "no range": ({"content_range": None}, [100_000]),
    "too long": ({"more": b"more"}, [0]),
    "short": ({"n": 300_000, "length": 300_000}, [400_000]),
    "416": ({"status": 416, "content_range": None}, [0]),
    "from the start, dropped": ({"status": 200, "n": 300_000}, range(280_000, 300_001)),
    "from the start": ({"status": 200}, []),
    "from the start, no length": ({"status": 200, "length": False}, []),
}


@pytest.mark.parametrize("name", ["encoder.json", DATA])
@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_made_good(server, capfd, name, fault):
    options, then = PASSING[fault]
    server.fill(name, server.files[name][:100_000])
    server.faults[name] = iter([options])
    server.download()
    [first, *others], [_, *said] = server.asked(), capfd.readouterr().err.splitlines()
    assert first == (name, 100_000) and len(others) == len(said) == len(server.pauses) == bool(then)
    assert all(start in then for _, start in others) and all(name in line for line in said)
    assert all(0 < pause < 10 for pause in server.pauses)
    server.assert_whole()


@pytest.mark.parametrize("faults", [[{"n": 50_000}, {"status": 503}] * 14, [{"status": None}] * 4], ids=["28", "4"])
def test_many_faults_are_made_good_while_it_goes_on(server, faults):
    """As long as something arrives there is no reason to give up."""
    server.faults[DATA] = iter(faults)
    server.download()
    assert len(server.asked()) == len(FILES) + len(faults)
    server.assert_whole()


LASTING = [{"n": 0}, {"status": None}, {"status": 503}, {"content_range": "bytes 0-9/10"}]


@pytest.mark.parametrize(("fault", "n_asked"), [(fault, 5) for fault in LASTING] + [({"status": 404}, 1), ({"status": 403}, 1)])
def test_a_lasting_fault_is_one_line_and_the_part_is_kept(server, fault, n_asked):
    server.fill(DATA, server.files[DATA][:1000])
    server.faults[DATA] = itertools.repeat(fault)
    with pytest.raises(OSError, match=re.escape(f"{server.url}/124M/{DATA}")) as error:
        server.download()
    assert not re.search(r"\n|Pool|0x|Errno|Error\(", str(error.value))
    assert server.asked() == [(DATA, 1000)] * n_asked and len(server.pauses) >= n_asked - 1
    assert (server.folder / f"{DATA}.part").read_bytes() == server.files[DATA][:1000]
    assert not (server.folder / DATA).exists()
