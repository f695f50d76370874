"""The download: whatever a server, a disk or a signal does, the files end up identical, or the reason is one line."""

import http.server
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
HPARAMS = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 4, "n_head": 2, "n_layer": 2}  # a tiny model, served as 124M


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path.removeprefix("/models/124M/"), self.server
        headers = " ".join(self.headers.get_all("Range") + self.headers.get_all("Accept-Encoding"))
        start = int(re.fullmatch(r"bytes=(\d+)- identity", headers)[1])
        server.requests.append((name, start))
        self.answer(server.files[name], start, **next(server.faults.get(name, iter(())), {}))

    def answer(self, body, start, status=206, length=None, content_range="bytes {}-{}/{}", more=b"", n=None, stall=0):
        """A good server's answer, if nothing else is wanted. n: only so many bytes. status None: hang up."""
        if not status or len(self.server.requests) > 99:  # there is no end to it
            return
        if status == 206 and start >= len(body):
            status, content_range = 416, "bytes */{2}"
        piece = {200: body, 206: body[start:]}.get(status, b"") + more
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", len(piece) if length is None else length)
        if content_range and status in (206, 416):
            self.send_header("Content-Range", content_range.format(start, len(body) - 1, len(body)))
        self.end_headers()
        for at in range(0, len(piece[:n]), 2**14):
            self.server.send(self.wfile, piece[:n][at : at + 2**14])
        self.server.go.wait(stall)

    def log_message(self, *_): ...


class Server(http.server.ThreadingHTTPServer):
    """Serves files under /models/124M/. faults: {name: iterator of options for Handler.answer}."""

    def __init__(self, files, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.folder, self.faults, self.requests, self.pauses = files, folder, {}, [], []
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

    def handle_error(self, *_):
        """The other side is gone."""

    def asked(self):
        """The requests since the last call: [(name, from which byte on)]."""
        asked, self.requests = self.requests, []
        return asked

    def fill(self, name, part=None):
        """Put all files but one into the folder, and of that one a part."""
        for other in {*FILES} - {name}:
            (self.folder / other).write_bytes(self.files[other])
        if part is not None:
            (self.folder / f"{name}.part").write_bytes(part)

    def download(self):
        utils.download_gpt2_files("124M", self.folder)

    def assert_whole(self):
        assert {path.name: path.read_bytes() for path in self.folder.iterdir()} == {**self.files, ".lock": b""}


@pytest.fixture
def server(tmp_path, vocabulary, monkeypatch):
    """The server, GPT2_MODELS_URL, an empty folder, pauses that are only noted, and no patience with a server."""
    write_checkpoint(tmp_path / "released", HPARAMS, random_tensors(HPARAMS))
    files = {name: ((vocabulary if name in FILES[:2] else tmp_path / "released") / name).read_bytes() for name in FILES}
    (tmp_path / "models/124M").mkdir(parents=True)
    server, send = Server(files, tmp_path / "models/124M"), requests.adapters.HTTPAdapter.send

    def impatient_send(*args, timeout, **options):
        return send(*args, timeout=min(timeout, (5, 1)), **options)  # fails if there is no timeout

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", impatient_send)
    monkeypatch.setattr(time, "sleep", server.pauses.append)
    monkeypatch.setenv("GPT2_MODELS_URL", server.url)
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def test_the_command_downloads_checks_and_runs(server):
    env = {"GPT2_MODELS_URL": f"{server.url}/"}
    first, second = (run("Once", "--models_dir", server.folder.parent, env=env) for _ in range(2))
    assert first.stderr == f"fetching 124M, 498 MB, from {server.url}/124M to {server.folder}\nchecking 124M …\n"
    assert (first.returncode, second.returncode, second.stdout, second.stderr) == (0, 0, first.stdout, "")
    assert server.asked() == [(name, 0) for name in FILES]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [None, 0, 0.5, 1, 2])
def test_only_what_is_missing_is_fetched(server, name, share):
    """A part is resumed where it ends, whole, or too long, and then dropped."""
    size = int((share or 0) * len(server.files[name]))
    server.fill(name, None if share is None else (server.files[name] * 2)[:size])
    server.download()
    assert server.asked() == [(name, size)] + [(name, 0)] * (share == 2)
    server.assert_whole()


@pytest.mark.parametrize("size", [0, 1, 400_000, -1])
def test_a_data_file_that_ends_early_is_resumed(server, size):
    server.fill(DATA)
    (server.folder / DATA).write_bytes(server.files[DATA][:size])
    utils.load_encoder_hparams_and_params("124M", server.folder.parent)
    assert server.asked() == [(DATA, size % len(server.files[DATA]))]
    assert (server.folder / DATA).read_bytes() == server.files[DATA]


HANG_UP, OFFSET = {"status": None}, 100_000
PASSING = {  # what goes wrong from OFFSET on, and where the requests after that may begin (none: there need not be any)
    "hung up 4 times": ([HANG_UP] * 4, [OFFSET]),
    "dropped": ([{"n": 300_000}], range(380_000, 400_001)),
    "dropped, no length": ([{"n": 300_000, "length": False}], [400_000]),
    "dropped and 503": ([{"n": 50_000}, {"status": 503}] * 2, range(OFFSET, 200_001)),
    "stalled": ([{"n": 300_000, "stall": 99}], range(380_000, 400_001)),
    "500": ([{"status": 500, "more": b"some page"}], [OFFSET]),
    "lying range": ([{"content_range": "bytes 99999-{1}/{2}"}], [OFFSET]),
    "no range": ([{"content_range": None}], [OFFSET]),
    "too long": ([{"more": b"more"}, {}], ["behind its end", 0]),
    "short": ([{"n": 300_000, "length": 300_000}], [400_000]),
    "416": ([{"status": 416, "content_range": None}], [0]),
    "from the start, dropped": ([{"status": 200, "n": 300_000}], range(280_000, 300_001)),
    "from the start": ([{"status": 200}], []),
    "from the start, no length": ([{"status": 200, "length": False}], []),
}


@pytest.mark.parametrize("name", ["encoder.json", DATA])
@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_made_good(server, capfd, name, fault):
    faults, then = PASSING[fault]
    server.fill(name, server.files[name][:OFFSET])
    server.faults[name] = iter(faults)
    server.download()
    said = capfd.readouterr().err.splitlines()[1:]
    [first, *others] = [start if start < len(server.files[name]) else "behind its end" for _, start in server.asked()]
    assert first == OFFSET and len(others) == (len(faults) if then else 0) and all(start in then for start in others)
    assert len(server.pauses) == len(said) == len(others) and all(name in line and "again" in line for line in said)
    server.assert_whole()


@pytest.mark.parametrize("fault", [{"n": 0}, HANG_UP, {"status": 503}, {"status": 404}])
def test_a_lasting_fault_is_one_line_and_the_part_is_kept(server, capfd, fault):
    server.fill(DATA, server.files[DATA][:OFFSET])
    server.faults[DATA] = iter([fault] * 99)
    with pytest.raises(OSError, match=re.escape(f"{server.url}/124M/{DATA}")) as error:
        server.download()
    assert not re.search(r"\n|Pool|0x|Errno|\wError", str(error.value)) and capfd.readouterr().err.count("\n") == 5
    assert server.asked() == [(DATA, OFFSET)] * 5 and sum(server.pauses) > 2
    assert (server.folder / f"{DATA}.part").read_bytes() == server.files[DATA][:OFFSET]
    assert not (server.folder / DATA).exists()


@pytest.mark.parametrize("name", [*FILES[:2], DATA])
def test_a_wrong_file_is_refused_at_once(server, name):
    server.fill(name)
    good, server.files[name] = server.files[name], b"<html>Log in first</html>"
    with pytest.raises(OSError, match=re.escape(f"{server.url}/124M/{name} is some other file")):
        server.download()
    assert len(server.asked()) == 1 and {*os.listdir(server.folder)} == {*FILES, ".lock"} - {name}
    server.files[name] = good
    server.download()
    server.assert_whole()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_no_network_is_one_line_and_nothing_is_left(server, url):
    line = error_of(run("Once", "--models_dir", server.folder.parent, env={"GPT2_MODELS_URL": url}))  # tried once
    assert f"{url}/124M/{FILES[0]}" in line and "--model_size 2M" in line
    assert not re.search(r"Pool|0x|Errno|\wError", line) and os.listdir(server.folder) == [".lock"]


def test_a_full_disk_keeps_the_part(server):
    server.fill(DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            server.download()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (server.folder / f"{DATA}.part").read_bytes() == server.files[DATA][:500_000]
    server.download()
    assert server.asked() == [(DATA, 0), (DATA, 500_000)]
    server.assert_whole()


DOWNLOAD = "import sys, utils; print('begins', flush=True); utils.download_gpt2_files('124M', sys.argv[1])"


def start(*args):
    return subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("point", [0, 300_000, 1_042_301, 1_300_000, 1_498_800, 1_900_000])
def test_a_run_that_is_killed_is_resumed(server, point, by):
    """Once so many bytes are sent the server waits, and the command is killed. SIGINT is Ctrl-C."""
    server.left = point
    process = start(ROOT / "gpt2.py", "Once", "--models_dir", server.folder.parent)
    assert server.stopped.wait(60) and not server.go.wait(0.3)
    process.send_signal(by)
    assert process.communicate(timeout=60)[1].count("\n") == 1 and process.returncode == -by
    done = {path.name: path.stat().st_size for path in server.folder.iterdir() if path.name != ".lock"}
    assert point - 40_000 <= sum(done.values()) <= point
    server.asked()
    server.download()
    assert server.asked() == [(name, done.get(f"{name}.part", 0)) for name in FILES if name not in done]
    server.assert_whole()


@pytest.mark.parametrize("killed", [False, True])
def test_another_run_waits_and_takes_over(server, killed):
    server.left = 300_000
    first = start("-c", DOWNLOAD, server.folder)
    assert server.stopped.wait(60)
    second = start("-c", DOWNLOAD, server.folder)
    assert second.stdout.readline() == "begins\n" and not server.go.wait(0.3)
    assert server.asked() == [(FILES[0], 0)]
    first.kill() if killed else server.go.set()
    for process in first, second:
        process.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL if killed else 0, 0)
    asked = server.asked()
    assert [name for name, _ in asked] == (FILES if killed else FILES[1:]) and (asked[0][1] > 250_000) == killed
    server.assert_whole()
