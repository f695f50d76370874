"""The download: whatever a server, a disk or a signal does, the files end up identical, or the reason is one line."""

import contextlib
import functools
import http.server
import io
import itertools
import os
import resource
import select
import shutil
import subprocess
import sys
import threading
import time

import pytest
import requests
import tqdm
import urllib3.util
from conftest import ROOT, error_of, random_tensors, run, write_checkpoint

import utils

DATA = "model.ckpt.data-00000-of-00001"
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", DATA]
HPARAMS = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 4, "n_head": 2, "n_layer": 2}


@pytest.fixture(scope="session")
def released(tmp_path_factory, vocabulary):
    """{name: bytes}: a tiny model with the released vocabulary, to be served as 124M."""
    folder = tmp_path_factory.mktemp("released")
    write_checkpoint(folder, HPARAMS, random_tensors(HPARAMS))
    for name in "encoder.json", "vocab.bpe":
        shutil.copy(vocabulary / name, folder)
    return {name: (folder / name).read_bytes() for name in FILES}


# ---- A server that can go wrong ---------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/models/124M/")
        asked = self.headers["Range"]
        server.requests.append((name, asked))
        if name not in server.files:
            return self.reply(404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        fault = next(server.faults.get(name, iter(())), None) or serve
        with contextlib.suppress(ConnectionError):
            fault(self, server.files[name], start)

    def reply(self, status, body=b"", length=None, content_range=None):
        """An answer; the connection ends with it. length: what Content-Length says (False: nothing)."""
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", len(body) if length is None else length)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        for at in range(0, len(body), 2**14):
            self.server.send(self.wfile, body[at : at + 2**14])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves files under /models/124M/. faults: {name: iterator of functions that answer in place of serve()}."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = dict(files), {}, []
        self.send = lambda to, piece: to.write(piece)
        self.url = f"http://127.0.0.1:{self.server_port}/models"

    def asked(self):
        """The requests since the last call."""
        asked, self.requests = self.requests, []
        return asked


def serve(handler, body, start):
    """What a good server answers."""
    if not start:
        handler.reply(200, body)
    elif start < len(body):
        handler.reply(206, body[start:], content_range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.reply(416, content_range=f"bytes */{len(body)}")


def drop(after):
    """Answer rightly, but end the connection after so many bytes."""

    def fault(handler, body, start):
        content_range = f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None
        handler.reply(
            206 if start else 200, body[start : start + after], length=len(body) - start, content_range=content_range
        )

    return fault


def hang_up(handler, body, start):
    handler.close_connection = True


def stall(handler, body, start):
    """Half of it, and then nothing for as long as the test goes on."""
    handler.send_response(200)
    handler.send_header("Content-Length", len(body))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.server.stalled.wait()


def status(code):
    return lambda handler, body, start: handler.reply(code)


def ignore_range(handler, body, start):
    handler.reply(200, body)


def wrong_range(content_range):
    """206 with the right bytes, and a Content-Range that is not what was asked for."""
    return lambda handler, body, start: handler.reply(206, body[start:], content_range=content_range)


def too_long(handler, body, start):
    content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
    handler.reply(206, body[start:] + b"more", content_range=content_range)


def half_of_the_rest(handler, body, start):
    end = (start + len(body)) // 2
    handler.reply(206, body[start:end], content_range=f"bytes {start}-{end - 1}/{len(body)}")


def other_bytes(handler, body, start):
    handler.reply(200, b"x" * len(body))


def without_length(handler, body, start):
    handler.reply(200, body, length=False)


def no_part_of_it(handler, body, start):
    handler.reply(416)


@pytest.fixture
def server(released, monkeypatch):
    """The server, GPT2_MODELS_URL, and no waiting between tries."""
    server = Server(released)
    server.stalled = threading.Event()
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    monkeypatch.setenv("GPT2_MODELS_URL", server.url)
    plain = urllib3.util.Retry
    monkeypatch.setattr(
        urllib3.util, "Retry", lambda *args, **options: plain(*args, **{**options, "backoff_factor": 0})
    )
    yield server
    server.stalled.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models/124M").mkdir(parents=True)
    return tmp_path / "models/124M"


def fill(folder, files, but=None):
    for name in files.keys() - {but}:
        (folder / name).write_bytes(files[name])


def download(folder):
    utils.download_gpt2_files("124M", folder)


def assert_whole(folder, released):
    assert sorted(os.listdir(folder)) == sorted(released)
    for name, content in released.items():
        assert (folder / name).read_bytes() == content, name


# ---- When all goes well ------------------------------------------------------------------------------------------------


def test_all_files(server, folder, released, capfd):
    download(folder)
    assert server.asked() == [(name, None) for name in FILES]
    assert_whole(folder, released)
    download(folder)
    assert server.asked() == []
    assert capfd.readouterr() == ("", "")  # bars are for terminals


@pytest.mark.parametrize("name", FILES)
def test_only_missing_files_are_fetched(server, folder, released, name):
    fill(folder, released, but=name)
    download(folder)
    assert server.asked() == [(name, None)]
    assert_whole(folder, released)


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_a_mirror(server, folder, released, monkeypatch, slash):
    monkeypatch.setenv("GPT2_MODELS_URL", server.url + slash)
    download(folder)
    assert_whole(folder, released)


def test_the_command_downloads_checks_and_runs(server, tmp_path, released):
    args = ["Once", "--n_tokens_to_generate", "3", "--models_dir", tmp_path / "models"]
    first, second = run(*args), run(*args)
    assert (first.returncode, first.stderr) == (0, "checking 124M …\n")
    assert [name for name, _ in server.asked()] == FILES
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")


# ---- Parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_part_is_resumed_where_it_ends(server, folder, released, name, share):
    fill(folder, released, but=name)
    size = int(share * len(released[name]))
    (folder / f"{name}.part").write_bytes(released[name][:size])
    download(folder)
    assert server.asked() == [(name, f"bytes={size}-" if size else None)]
    assert_whole(folder, released)


def test_the_bar_shows_a_resumed_part_as_done(server, folder, released, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})
            bars.append((self, self.n, self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    fill(folder, released, but=DATA)
    (folder / f"{DATA}.part").write_bytes(released[DATA][:1000])
    download(folder)
    [(bar, begun, total)] = bars
    assert (begun, total, bar.n) == (1000, len(released[DATA]), len(released[DATA]))


@pytest.mark.parametrize("size", [0, 1, 400_000, 804_000])
def test_a_data_file_that_ends_early_is_resumed(server, folder, released, tmp_path, size):
    fill(folder, released)
    os.truncate(folder / DATA, size)
    utils.load_encoder_and_hparams("124M", tmp_path / "models")
    assert server.asked() == [(DATA, f"bytes={size}-" if size else None)]
    assert_whole(folder, released)


@pytest.mark.parametrize(
    ("name", "part", "n_requests"),
    [
        (DATA, lambda whole: whole + b"more", 2),  # longer than the file
        ("hparams.json", lambda whole: b"x" * 10_000, 2),
        ("encoder.json", lambda whole: b"x" * 1000, 2),  # something else: its SHA-256 tells
        ("encoder.json", lambda whole: b"x" * len(whole), 2),
    ],
)
def test_a_part_that_is_no_part_is_dropped(server, folder, released, name, part, n_requests):
    fill(folder, released, but=name)
    (folder / f"{name}.part").write_bytes(part(released[name]))
    download(folder)
    asked = server.asked()
    assert len(asked) == n_requests and asked[-1] == (name, None)
    assert_whole(folder, released)


def test_a_part_that_is_too_long_for_a_server_without_range(server, folder, released):
    fill(folder, released, but=DATA)
    (folder / f"{DATA}.part").write_bytes(released[DATA] + b"more")
    server.faults[DATA] = iter([ignore_range])
    download(folder)
    assert len(server.asked()) == 1
    assert_whole(folder, released)


def test_a_part_of_another_data_file_is_not_believed(server, folder, released, tmp_path):
    fill(folder, released, but=DATA)
    (folder / f"{DATA}.part").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=DATA):
        utils.load_encoder_hparams_and_params("124M", tmp_path / "models")
    os.remove(folder / DATA)  # as the message says
    utils.load_encoder_hparams_and_params("124M", tmp_path / "models")
    assert (folder / DATA).read_bytes() == released[DATA]


# ---- Faults on the way -------------------------------------------------------------------------------------------------

PASSING = {  # what goes wrong, and from where the next request begins: the same byte, a later one, the first; None: no need
    "hang up": (hang_up, "same"),
    "dropped at once": (drop(0), "same"),
    "dropped": (drop(300_000), "later"),
    "stalled": (stall, "later"),
    "500": (status(500), "same"),
    "502": (status(502), "same"),
    "503": (status(503), "same"),
    "504": (status(504), "same"),
    "other bytes": (wrong_range("bytes 0-9/10"), "same"),
    "other start": (wrong_range("bytes 99999-999999/1000000"), "same"),
    "no range": (wrong_range(None), "same"),
    "no such range": (wrong_range("pages 1-2/3"), "same"),
    "too long": (too_long, "first"),
    "short": (half_of_the_rest, "later"),
    "416": (no_part_of_it, "first"),
    "ignored range, dropped": (lambda handler, body, start: handler.reply(200, body[:9], length=len(body)), "later"),
    "ignored range": (ignore_range, None),
}


@pytest.mark.parametrize("name", ["encoder.json", DATA])
@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_made_good(server, folder, released, monkeypatch, name, fault):
    answer, then = PASSING[fault]
    get = requests.Session.get
    monkeypatch.setattr(
        requests.Session, "get", lambda *args, **options: get(*args, **{**options, "timeout": (1, 0.3)})
    )
    fill(folder, released, but=name)
    (folder / f"{name}.part").write_bytes(released[name][:100_000])
    server.faults[name] = iter([answer])
    download(folder)
    first, *rest = [asked for _, asked in server.asked()]
    assert first == "bytes=100000-" and len(rest) == (then is not None)
    if then == "same":
        assert rest == [first]
    elif then == "first":
        assert rest == [None]
    elif then == "later":
        assert int(rest[0][6:-1]) >= 100_000
    assert_whole(folder, released)


@pytest.mark.parametrize(
    "faults", [[drop(50_000)] * 16, [drop(50_000), status(503)] * 16, [hang_up] * 4], ids=["drops", "drops, 503", "4"]
)
def test_many_faults_are_made_good_while_it_goes_on(server, folder, released, faults):
    """As long as something arrives there is no reason to give up, and little of it is fetched twice."""
    server.faults[DATA] = iter(faults)
    download(folder)
    assert len(server.asked()) <= len(FILES) + len(faults)
    assert_whole(folder, released)


def test_a_file_of_unknown_length(server, folder, released):
    server.faults = {name: iter([without_length]) for name in FILES}
    download(folder)
    assert_whole(folder, released)


@pytest.mark.parametrize(
    ("fault", "n_requests", "words"),
    [
        (drop(0), 5, ["broke off"]),
        (hang_up, 5, []),
        (status(500), 5, ["500"]),
        (status(503), 5, ["503"]),
        (wrong_range("bytes 0-9/10"), 5, ["bytes 0-9/10"]),
        (status(404), 1, ["404"]),
        (status(403), 1, ["403"]),
    ],
)
def test_a_lasting_fault_is_one_line_and_the_part_is_kept(server, folder, released, fault, n_requests, words):
    fill(folder, released, but=DATA)
    (folder / f"{DATA}.part").write_bytes(released[DATA][:1000])
    server.faults[DATA] = itertools.repeat(fault)
    with pytest.raises(OSError) as error:
        download(folder)
    message = str(error.value)
    assert f"{server.url}/124M/{DATA}" in message and "\n" not in message
    assert all(word in message for word in words)
    assert server.asked() == [(DATA, "bytes=1000-")] * n_requests
    assert not (folder / DATA).exists() and (folder / f"{DATA}.part").read_bytes() == released[DATA][:1000]
    server.faults.clear()
    download(folder)
    assert server.asked() == [(DATA, "bytes=1000-")]
    assert_whole(folder, released)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_wrong_vocabulary_never_gets_into_place(server, folder, released, name):
    server.faults[name] = iter([other_bytes])
    download(folder)
    assert_whole(folder, released)
    os.remove(folder / name)
    server.faults[name] = itertools.repeat(other_bytes)
    with pytest.raises(OSError, match=f"{name}.*SHA-256"):
        download(folder)
    assert not (folder / name).exists()


def test_a_server_that_understates_the_length(server, folder, released, tmp_path):
    """A data file that is too short is an error, not weights; the next run fetches the rest."""
    server.faults[DATA] = iter([lambda handler, body, start: handler.reply(200, body[:1000])])
    with pytest.raises((ValueError, OSError), match=f"{DATA}.*1000"):
        utils.load_encoder_hparams_and_params("124M", tmp_path / "models")
    server.asked()
    utils.load_encoder_hparams_and_params("124M", tmp_path / "models")
    assert server.asked() == [(DATA, "bytes=1000-")]
    assert (folder / DATA).read_bytes() == released[DATA]


# ---- No network, no space ----------------------------------------------------------------------------------------------


def test_a_refused_connection_is_not_tried_again(folder, monkeypatch):
    calls = []
    plain = urllib3.util.connection.create_connection
    monkeypatch.setattr(
        urllib3.util.connection,
        "create_connection",
        lambda *args, **options: calls.append(args) or plain(*args, **options),
    )
    monkeypatch.setenv("GPT2_MODELS_URL", "http://127.0.0.1:1/mirror")
    with pytest.raises(OSError):
        download(folder)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("url", "hint"), [("http://127.0.0.1:1/mirror", 1), ("http://no-such-host.invalid/mirror", 1), ("nonsense", 0)]
)
def test_no_network_is_one_line_that_helps(tmp_path, url, hint):
    line = error_of(run("Once", "--models_dir", tmp_path / "models", env={"GPT2_MODELS_URL": url}))
    assert f"{url}/124M/{FILES[0]}" in line and line.count("--model_size 2M") == hint
    assert os.listdir(tmp_path / "models/124M") == []


def test_a_server_that_answers_everything_with_a_page_leaves_nothing(server, tmp_path):
    server.files |= dict.fromkeys(FILES, b"<html>Log in first</html>")
    error_of(run("Once", "--models_dir", tmp_path / "models"))
    assert os.listdir(tmp_path / "models/124M") == []


def test_a_404_as_a_command(server, tmp_path):
    del server.files["vocab.bpe"]
    line = error_of(run("Once", "--models_dir", tmp_path / "models"))
    assert "404" in line and f"{server.url}/124M/vocab.bpe" in line


def test_a_full_disk_is_said_so(server, folder, released):
    os.symlink("/dev/full", folder / f"{DATA}.part")
    with pytest.raises(OSError, match=f"{DATA}.*No space left"):
        download(folder)
    assert not (folder / DATA).exists()


def test_a_full_disk_keeps_the_part(server, folder, released):
    fill(folder, released, but=DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(OSError, match=f"{DATA}.*too large") as error:
            download(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    part = (folder / f"{DATA}.part").read_bytes()
    assert len(part) == 500_000 and part == released[DATA][:500_000]
    server.asked()
    download(folder)
    assert server.asked() == [(DATA, "bytes=500000-")]
    assert_whole(folder, released)


# ---- Ends by force, and others at the same time ---------------------------------------------------------------------------

POINTS = [0, 50, 200, 300_000, 1_000_000, 1_042_495, 1_200_000, 1_498_800, 1_500_000, 1_700_000, 2_000_000, 2_300_000]
DOWNLOAD = "import sys, utils; utils.download_gpt2_files('124M', sys.argv[1])"


def start_download(folder):
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, folder], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("settle", [0, 0.2])
def test_kill_9_at_any_point(server, folder, released, point, settle):
    """Once `point` bytes are sent the server waits, and the download is killed: the second run goes on from there."""
    sent, reached = [], threading.Event()

    def send(to, piece):
        left = point - sum(sent)
        sent.append(len(piece))
        to.write(piece[:left] if left < len(piece) else piece)
        if left < len(piece):
            reached.set()
            server.stalled.wait()

    plain, server.send = server.send, send
    process = start_download(folder)
    try:
        assert reached.wait(60)
        time.sleep(settle)
    finally:
        process.kill()
        process.communicate()
    server.send = plain
    assert not (folder / DATA).exists()
    parts = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".part"}
    done = [name for name in FILES if (folder / name).exists()]
    assert all((folder / name).read_bytes() == released[name] for name in done) and len(parts) <= 1
    server.asked()
    download(folder)
    asked = dict(server.asked())
    assert list(asked) == [name for name in FILES if name not in done]
    for part, size in parts.items():
        assert asked[part.removesuffix(".part")] == (f"bytes={size}-" if size else None)
    assert_whole(folder, released)


@pytest.mark.parametrize("n", [2, 3])
def test_several_at_once(server, folder, released, n):
    """The others wait until the first has all of it."""
    everyone = threading.Event()

    def send(to, piece):
        everyone.wait(60)
        to.write(piece)

    server.send = send
    processes = [start_download(folder) for _ in range(n)]
    try:
        waiting = set()
        while len(waiting) < n - 1:
            [*said], _, _ = select.select(
                [process.stderr for process in processes if process not in waiting], [], [], 60
            )
            assert said
            waiting |= {process for process in processes if process.stderr in said}
        everyone.set()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * n
        assert sorted(map(len, map(str.splitlines, errors))) == [0] + [1] * (n - 1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert server.asked() == [(name, None) for name in FILES]
    assert_whole(folder, released)


def test_another_takes_over_when_the_first_is_killed(server, folder, released):
    first_waits = threading.Event()

    def send(to, piece):
        if not first_waits.is_set():
            first_waits.set()
            server.stalled.wait()
        to.write(piece)

    server.send = send
    first = start_download(folder)
    assert first_waits.wait(60)
    second = start_download(folder)
    try:
        assert "waiting" in second.stderr.readline()
        first.kill()
        first.communicate()
        second.communicate(timeout=60)
    finally:
        second.kill()
    assert second.returncode == 0
    assert_whole(folder, released)
