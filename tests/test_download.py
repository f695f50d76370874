"""The download: whatever a server, a disk or a signal does, the files end up identical, or the reason is one line."""

import fcntl
import hashlib
import http.server
import json
import os
import pty
import re
import resource
import signal
import ssl
import subprocess
import sys
import termios
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import requests
from conftest import ROOT

import gpt2
import utils

INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", INDEX, DATA]
TINY = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 4, "n_head": 1, "n_layer": 2}  # served as 124M and as 355M
HTML = b"<html>Log in first</html>"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path.removeprefix(f"/models/{self.server.folder.name}/"), self.server
        headers = " ".join(self.headers.get_all("Range") + self.headers.get_all("Accept-Encoding"))
        start = int(re.fullmatch(r"bytes=(\d+)- identity", headers)[1])
        server.requests.append((name, start))
        self.answer(start, **{"body": server.files[name], **next(server.faults.get(name, iter(())), {})})

    def answer(self, start, body, status=206, length=None, content_range="bytes {}-{}/{}", more=b"", n=None, stop=None):
        """A good server's answer, if nothing else is wanted. n: only so many bytes. stop: after so many, until go."""
        if not status or len(self.server.requests) > 99:  # hang up; there is no end to it
            return self.wfile.write(more)
        if status == 206 and start >= len(body):
            status, content_range = 416, "bytes */{2}"
        piece = {200: body, 206: body[start:]}.get(status, b"") + more
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", length or len(piece))
        if content_range and status in (206, 416):
            self.send_header("Content-Range", content_range.format(start, len(body) - 1, len(body)))
        self.end_headers()
        self.wfile.write(piece[:n][:stop])
        if stop is not None:
            self.server.stopped.set()
            self.server.go.wait()
            self.wfile.write(piece[stop:])

    log_message = Mock()


class Server(http.server.ThreadingHTTPServer):
    """Serves files as the model that folder is named for. faults: {name: iterator of options for Handler.answer}."""

    handle_error = Mock()  # the other side is gone

    def fill(self, name, content=None, suffix=".part"):
        """Put all files but one into the folder, and of that one a part."""
        self.folder.mkdir(parents=True)
        for other in {*FILES} - {name}:
            (self.folder / other).write_bytes(self.files[other])
        if content is not None:
            (self.folder / f"{name}{suffix}").write_bytes(content)

    def start(self, code, *args):
        args, pipe = [sys.executable, "-c", self.patch + code, *map(str, args)], subprocess.PIPE
        return subprocess.Popen(args, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def download(self):
        utils.download_gpt2_files(self.folder.name, self.folder)
        assert {path.name: path.read_bytes() for path in self.folder.iterdir()} == {**self.files, ".lock": b""}

    def download_fails(self):
        with pytest.raises(OSError) as error:
            self.download()
        assert not re.search(r"\n|Pool|0x|\wError", str(error.value))  # one line in plain words
        return str(error.value)


@pytest.fixture
def server(vocabulary, tmp_path, monkeypatch):
    """A tiny 355M, and 124M, which is known by its hashes, also to what server.start() starts; pauses are only noted."""
    files = {name: (vocabulary / name).read_bytes() for name in FILES[:2]} | {INDEX: b"some index " * 20_000}
    files["hparams.json"] = json.dumps(TINY).encode()
    files["checkpoint"] = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    files[DATA] = np.linspace(-0.1, 0.1, utils.data_size(TINY) // 4, dtype="<f4").tobytes()
    server, send = Server(("127.0.0.1", 0), Handler), requests.adapters.HTTPAdapter.send
    impatient_send = lambda *args, timeout, **options: send(*args, timeout=min(timeout, (5, 1)), **options)
    server.files, server.folder, server.faults, server.requests = files, tmp_path / "new/models/355M", {}, []
    server.pauses, server.stopped, server.go = [], threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/models"
    hashes = {f"124M/{name}": hashlib.sha256(files[name]).hexdigest() for name in (INDEX, DATA)}
    server.patch = "import gpt2, sys, utils; "
    for name, entries in ("HPARAMS", {"124M": TINY, "355M": TINY}), ("SHA256", hashes):
        server.patch += f"utils.{name} |= {entries}; "
        monkeypatch.setattr(utils, name, getattr(utils, name) | entries)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", impatient_send)
    monkeypatch.setattr(time, "sleep", server.pauses.append)
    monkeypatch.setenv("GPT2_MODELS_URL", server.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def test_the_command_downloads_checks_and_runs_without_tensorflow(server, monkeypatch):
    server.folder = server.folder.parent / "124M"
    monkeypatch.setenv("GPT2_MODELS_URL", f"{server.url}/")
    code = "sys.modules['tensorflow'] = None; utils.run(gpt2.cli); print('requests' in sys.modules)"
    [first, said], second = [server.start(code, "Once", "--models_dir=~/new/models").communicate() for _ in range(2)]
    assert re.fullmatch(rf"fetching 124M, 1 MB.* {server.url}/124M .*{server.folder}\nchecking 124M …\n", said)
    assert first.endswith("\nTrue\n") and second == (first[:-5] + "False\n", "")
    assert server.requests == [(name, 0) for name in FILES]


THERE = [(name, ".part", share) for name in FILES for share in (None, 0, 0.5, 1)]
THERE += [(name, ".part", 2) for name in (*FILES[:2], "checkpoint", DATA)] + [(DATA, "", 0), (DATA, "", 0.5)]


@pytest.mark.parametrize(("name", "suffix", "share"), THERE)
def test_only_what_is_missing_is_fetched(server, name, suffix, share):
    size = int((share or 0) * len(server.files[name]))  # a part, all, or more than that, which is dropped
    server.faults[name] = iter([{"status": 200 if name in FILES[::2] else 206}])  # without ranges, or with
    server.fill(name, None if share is None else (server.files[name] * 2)[:size], suffix)
    server.download()
    assert server.requests == [(name, size if share != 2 else 0)] and server.pauses == []


OFFSET, LONG_PAGE = 100_000, HTML * 10**5
# These bring nothing.
NOTHING = [{"n": 0}, {"status": None}, {"status": 503, "more": HTML}, {"content_range": "bytes 99999-{1}/{2}"}]
NOTHING += [{"content_range": None}, {"more": b"more"}, {"status": 500}, {"status": None, "more": b"SSH-2.0\r\n"}]
# The answers from OFFSET on, and where the requests after them may begin (nowhere: there need not be any)
FAULTS = [(NOTHING[:4], [OFFSET]), ([*NOTHING[:4], {"n": 50_000}, *NOTHING[3:7]], range(OFFSET, 150_001))]
FAULTS += [([{"n": 300_000}], range(380_000, 400_001)), ([{"stop": 300_000}], range(380_000, 400_001))]
FAULTS += [([{"n": 300_000, "length": length}], [400_000]) for length in (False, 300_000)]
FAULTS += [([{"status": 200, "n": 300_000}], range(280_000, 300_001))]
FAULTS += [([{"status": 200}], []), ([{"status": 200, "length": False}], [])]
# or, if it lasts, or is no use to be tried again, what the message must have of it.
FAULTS += [([fault] * 9, "") for fault in [*NOTHING, {"status": 200, "n": 300_000, "length": False}]]
FAULTS += [([{"status": status, "more": HTML}] * 9, f" {status}") for status in (304, 408, 416, 429)]
FAULTS += [([{"status": 416, "content_range": text}] * 9, " 416") for text in (None, "bytes */{}", "bytes */{2}")]
FAULTS += [([{"status": status, "more": HTML}], f" {status}") for status in (400, 401, 403, 404, 410, 499)]
FAULTS += [([{"status": 200, "body": page}], f" 200.* {len(page)} ") for page in (HTML, LONG_PAGE)]
FAULTS += [([{"body": LONG_PAGE, "status": 200, "length": False}], " 200"), ([{"body": LONG_PAGE}], " 206.*2500000")]
CASES = [(name, *fault) for name in ("encoder.json", DATA) for fault in FAULTS]  # and where the size is not known:
CASES += [(INDEX, [{"n": 50_000}], range(130_000, 150_001)), (INDEX, [{"status": 200, "body": b"some"}], " 200.* 4 ")]


@pytest.mark.parametrize(("name", "answers", "then"), CASES)
def test_a_fault_is_made_good_or_told_and_the_part_is_kept(server, capfd, name, answers, then):
    part, server.faults[name] = server.files[name][:OFFSET], iter(answers)
    server.fill(name, part)
    if isinstance(then, str):
        said, n_tries = server.download_fails(), min(len(answers), 5)
        assert re.search(f"{server.url}/355M/{name}.*{then}", said) and (n_tries == 5 or "run again" not in said)
        assert server.requests == [(name, OFFSET)] * n_tries and len(server.pauses) == n_tries - 1
        assert n_tries == 1 or 2 < sum(server.pauses) < 20  # seconds
        assert (server.folder / f"{name}.part").read_bytes() == part and not (server.folder / name).exists()
    else:
        server.download()
        [first, *others], [_, *told] = [start for _, start in server.requests], capfd.readouterr().err.splitlines()
        assert first == OFFSET and len(others) == (len(answers) if then else 0) and {*others} <= {*then}
        assert len(server.pauses) == len(told) == len(others) and all(name in line for line in told)


URLS = [(f"{text}models", "", 1) for text in ("127.0.0.1:1/", "/", "ftp://127.0.0.1/", "http://[/")]
URLS += [("https://{}", "self-signed", 1), ("http://127.0.0.1:1", "refused", 5), ("http://not.invalid", "", 5)]
URLS += [("http://behind-a-proxy.invalid", "proxy.*refused", 5)]


@pytest.mark.parametrize(("url", "reason", "n_tries"), URLS)
def test_a_url_that_leads_nowhere_is_told_at_once_if_it_never_can(server, monkeypatch, url, reason, n_tries):
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", Mock(side_effect=ssl.SSLCertVerificationError(1, "self-signed")))
    for name, value in ("http_proxy", "http://127.0.0.1:1"), ("NO_PROXY", ""), ("no_proxy", "127.0.0.1,not.invalid"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPT2_MODELS_URL", url := url.format(server.url.removeprefix("http://")))
    said = server.download_fails()
    assert f"{url}/355M/{FILES[0]}" in said and re.search(reason, said) and ("proxy:" in said) == ("proxy" in reason)
    assert len(server.pauses) == n_tries - 1 and ("run again" in said) == ("--model_size 2M" in said) == (n_tries > 1)
    assert os.listdir(server.folder) == [".lock"] and "Errno" not in said


WRONG = [("124M", name, how) for name in FILES for how in ("page", "half")] + [("124M", DATA, "flipped")]
WRONG += [("355M", name, how) for name in FILES[:4] for how in ("page", "half")] + [("355M", "checkpoint", "flipped")]
WRONG += [("355M", INDEX, "empty")]
WRONG += [("355M", "hparams.json", key) for key in TINY]


@pytest.mark.parametrize("answer", [{}, {"status": 200}, {"status": 200, "length": False}], ids=str)
@pytest.mark.parametrize(("size", "name", "how"), WRONG)
def test_a_wrong_file_is_not_kept(server, size, name, how, answer):
    server.folder, good = server.folder.parent / size, server.files[name]
    wrong = {"empty": b"", "page": HTML, "half": good[: len(good) // 2]}
    wrong["flipped"] = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    server.files[name] = wrong[how] if how in wrong else json.dumps({**TINY, how: 10}).encode()
    server.faults[name] = iter([answer] * 5)
    assert f"{server.url}/{size}/{name}" in server.download_fails() and not (server.folder / name).exists()
    server.files[name] = good
    server.download()


def test_a_disk_that_is_full_and_has_no_locks(server, monkeypatch):
    server.fill(DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError("no locks")))
    try:
        assert "too large" in server.download_fails()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (server.folder / f"{DATA}.part").read_bytes() == server.files[DATA][:500_000]
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    server.download()
    assert server.requests == [(DATA, 0), (DATA, 500_000)]


def test_the_progress_is_shown_on_a_terminal(server, monkeypatch):
    shown, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, bytes([24, 0, 80, 0, 0, 0, 0, 0]))  # lines, columns
    with open(shown, "rb", 0) as shown, open(stderr, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        server.download()
        print("\0", file=stderr, flush=True)
        assert b"".join(iter(lambda: shown.read(1), b"\0")).count(b"100%") >= len(FILES)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, 0])
@pytest.mark.parametrize(("name", "stop"), [(FILES[0], 0), (FILES[0], 300_000), (INDEX, 0), (DATA, 700_000)])
def test_another_run_says_that_it_waits_and_goes_on_where_one_is_killed(server, name, stop, by):
    """Once so many bytes of a file are sent, the server waits. SIGINT is Ctrl-C; 0: nobody kills it."""
    server.faults[name], runs = iter([{"stop": stop}]), []
    for _ in range(2):
        runs.append(server.start("utils.run(utils.download_gpt2_files)", "355M", "~/new/models/355M"))
        assert server.stopped.wait(60)
    assert [runs[1].stderr.readline()[:7] for _ in range(2)] == ["fetchin", "waiting"] and not server.go.wait(0.3)
    size = sum(part.stat().st_size for part in server.folder.glob(f"{name}.part"))
    assert stop - 40_000 <= size <= stop
    asked = [(file, start) for file in FILES for start in ((0, size) if file == name and by else (0,))]
    runs[0].send_signal(by) if by else server.go.set()
    assert [run.communicate(timeout=60)[1].count("\n") for run in runs] == [1, 0]
    assert [run.returncode for run in runs] == [-by, 0] and server.requests == asked
    server.download()


URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
RELEASED = {"124M": (50257, 1024, 768, 12, 12, 497_759_232), "355M": (50257, 1024, 1024, 16, 24, 1_419_292_672)}
RELEASED |= {"774M": (50257, 1024, 1280, 20, 36, 3_096_120_320), "1558M": (50257, 1024, 1600, 25, 48, 6_230_444_800)}


@pytest.mark.parametrize(("size", "name"), [*[(size, DATA) for size in RELEASED], *[("124M", name) for name in FILES]])
def test_the_released_models(tmp_path, monkeypatch, size, name):
    send = Mock(side_effect=requests.ConnectionError("no network"))
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("GPT2_MODELS_URL", "")
    folder, hparams, n_bytes = tmp_path / size, dict(zip(TINY, RELEASED[size])), RELEASED[size][-1]
    for n_new, error in (1024, ValueError), (1023, OSError):
        with pytest.raises(error, match="n_tokens_to_generate.*1023|no network"):
            gpt2.main("hi", n_new, size, tmp_path)
    for file in FILES:
        (folder / file).write_text('model_checkpoint_path: "model.ckpt"')
    os.truncate(folder / DATA, n_bytes + (size == "355M"))  # it may be longer
    for key in hparams:
        (folder / "hparams.json").write_text(json.dumps({**hparams, key: 5}))
        with pytest.raises(ValueError, match="hparams.json"):
            utils.load_encoder_hparams_and_params(size, tmp_path)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    utils.download_gpt2_files(size, folder)
    assert send.call_count == 5 and {*os.listdir(folder)} == {*FILES, ".lock"}
    os.truncate(folder / DATA, n_bytes - 1) if name == DATA else os.remove(folder / name)
    (folder / "checkpoint").write_bytes(HTML if name == "checkpoint" else b"model_checkpoint_path")
    with pytest.raises(OSError, match=f"{URL}/{size}/{name}"):
        utils.download_gpt2_files(size, folder)
    asked = [(request.url, request.headers["Range"]) for [request], _ in send.call_args_list[5:]]
    assert asked == [(f"{URL}/{size}/{name}", f"bytes={n_bytes - 1 if name == DATA else 0}-")] * 5
    assert send.call_args.kwargs["timeout"][0] <= 60 <= send.call_args.kwargs["timeout"][1] <= 300  # seconds
    assert utils.SHA256[f"124M/{INDEX}"] == "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"
    assert utils.SHA256[f"124M/{DATA}"] == "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
