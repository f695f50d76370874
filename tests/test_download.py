"""The download: whatever a server, a disk or a signal does, the files are right in the end, or one line says why."""

import hashlib
import io
import itertools
import json
import re
import signal
import ssl
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
import requests
from conftest import ROOT
from server import PAGE, Server, index_of

import utils
from utils import DATA, FILES

TINY = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 4, "n_head": 1, "n_layer": 2}  # served as 124M and as 355M
SIZE, PART = 807_120, 100_000  # bytes of its data file, and of those how many are there when a server fails


class Mirror(Server):
    def fill(self, missing, others):
        """Put all files but one into the folder, and others."""
        self.folder.mkdir(parents=True)
        for name, content in {**{name: self.files[name] for name in FILES if name != missing}, **others}.items():
            (self.folder / name).write_bytes(content)

    def download(self):
        utils.download_gpt2_files(self.folder.name, self.folder)
        assert {path.name: path.read_bytes() for path in self.folder.glob("[!.]*")} == self.files

    def download_fails(self):
        """What is said of it: one line in plain words, with nothing in it that a terminal obeys."""
        with pytest.raises((OSError, ValueError)) as error:
            self.download()
        said = str(error.value)
        assert said.isprintable() and not re.search(r"Pool|0x|\wError|None", said)
        return said

    def start(self, code):
        command = [sys.executable, "-c", f"import gpt2, sys, utils; {self.tiny}; {code}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


@pytest.fixture
def mirror(vocabulary, tmp_path, monkeypatch):
    """Serves the tiny model, 124M with hashes. Pauses are only noted, and who stops sending is left after a second."""
    files = {name: (vocabulary / name).read_bytes() for name in FILES[:2]}
    files["checkpoint"] = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    files["hparams.json"], files["model.ckpt.index"] = json.dumps(TINY).encode(), index_of(TINY)
    files[DATA] = np.linspace(-0.1, 0.1, SIZE // 4, dtype="<f4").tobytes()
    hashes = {f"124M/{name}": hashlib.sha256(files[name]).hexdigest() for name in FILES[4:]}
    mirror, send = Mirror(files), requests.adapters.HTTPAdapter.send
    mirror.folder, mirror.pauses = tmp_path / "new/models/355M", []
    mirror.tiny = f"utils.RELEASED.update({ {'124M': TINY, '355M': TINY} }); utils.SHA256.update({hashes})"
    monkeypatch.setattr(utils, "RELEASED", {**utils.RELEASED, "124M": TINY, "355M": TINY})
    monkeypatch.setattr(utils, "SHA256", {**utils.SHA256, **hashes})

    def impatient(*args, timeout, **options):
        return send(*args, timeout=tuple(min(1, seconds) for seconds in timeout), **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", impatient)
    monkeypatch.setattr(time, "sleep", mirror.pauses.append)
    for name, value in {"GPT2_MODELS_URL": mirror.url, "NO_PROXY": "*", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield mirror
    mirror.go.set()
    mirror.shutdown()
    mirror.server_close()


def test_the_command_fetches_and_runs_and_fetches_nothing_again(mirror, monkeypatch):
    monkeypatch.setenv("GPT2_MODELS_URL", f"{mirror.url}/")
    code = "sys.argv[1:] = ['Once', '--models_dir=~/new/models', '--model_size=124M']; utils.run(gpt2.cli); "
    code += "print([name for name in ('requests', 'tensorflow') if sys.modules.get(name)])"
    [first, said], second = [mirror.start(code).communicate(timeout=60) for _ in range(2)]
    assert re.fullmatch(rf"fetching 124M, 1 MB, .*{mirror.url}/124M .*{mirror.folder.parent}.124M\n", said)
    assert first.endswith("['requests']\n") and second == (first.replace("'requests'", ""), "")
    assert mirror.requests == [(name, 0) for name in FILES]


THERE = {  # (what is there in the place of a file, how many bytes of it or none, where requests for it start)
    **{f"no {name}": (name, None, [0]) for name in FILES},
    "a data file that is too short": (DATA, PART, [0]),
    "a data file that is too long": (DATA, SIZE + 1, [0]),
    "a part": (f"{DATA}.part", PART, [PART]),
    "a part that is too long": (f"{DATA}.part", SIZE + 1, [0]),
}


@pytest.mark.parametrize("case", THERE)
def test_what_is_missing_is_fetched_and_no_more(mirror, case):
    there, n_bytes, starts = THERE[case]
    name = there.removesuffix(".part")
    mirror.fill(name, {} if n_bytes is None else {there: (mirror.files[name] * 2)[:n_bytes]})
    mirror.download()
    assert mirror.requests == [(name, start) for start in starts]


MADE_GOOD = {  # what is wrong with the first answers: where later requests for the data file may start
    **dict.fromkeys(["sends all again", "sends it zipped", "sends elsewhere"], (PART,)),
    **dict.fromkeys(["hangs up", "503", "429", "sends no byte", "sends another place", "sends no place"], (PART,)),
    **dict.fromkeys(["sends all again and breaks off", "503, 503, 503, 503"], (PART,)),
    "breaks off": range(PART + 30_000, PART + 50_001),
    "stops sending": range(SIZE // 2, SIZE * 6 // 10 + 1),
    "500, 500, 500, 500, breaks off, 500, 500, 500, 500": range(PART, PART + 50_001),
}


@pytest.mark.parametrize("name", [DATA, "vocab.bpe"])
@pytest.mark.parametrize("faults", MADE_GOOD)
def test_a_file_is_whole_in_the_end_though_the_server(mirror, capfd, faults, name):
    mirror.fill(name, {f"{name}.part": mirror.files[name][:PART]})
    mirror.faults[name] = iter([fault for fault in faults.split(", ") if name == DATA or fault != "500"])
    mirror.download()
    starts, told = [start for _, start in mirror.requests], capfd.readouterr().err.splitlines()[1:]
    if name == DATA:
        assert starts[0] == PART and {*starts[1:]} <= {*MADE_GOOD[faults]}
    else:
        assert {*starts} == {0}
    assert len(told) == len(mirror.pauses) and all(name in line for line in told)  # a line for each try that failed
    assert not told or faults not in ("sends all again", "sends it zipped", "sends elsewhere")


REFUSED = {  # what a server always does: (what is said of it, how many tries there are at most)
    **{code: (code, 1) for code in ("400", "401", "403", "404", "410", "416")},
    **{code: (code, 5) for code in ("408", "429", "500", "503")},
    "hangs up": ("closed|aborted|reset", 5),
    "says that all is there": ("416", 1),
    "has a reason in red": ("404", 1),
    **dict.fromkeys(["304", "sends a page", "sends a page of untold length", "sends a page as the rest"], ("", 5)),
    **dict.fromkeys(["sends a page for ever", "sends the rest and more for ever", "is no web server"], ("", 5)),
    **dict.fromkeys(["has a length in red", "has a place in red", "sends elsewhere, in red"], ("", 5)),
}


@pytest.mark.parametrize("name", [DATA, "encoder.json"])
@pytest.mark.parametrize("fault", REFUSED)
def test_nothing_is_kept_or_lost_if_the_server_always(mirror, capfd, fault, name):
    part, (reason, n_tries) = mirror.files[name][:PART], REFUSED[fault]
    mirror.fill(name, {f"{name}.part": part})
    mirror.faults[name] = itertools.repeat(fault)
    said = mirror.download_fails()
    assert f"{mirror.url}/355M/{name}" in said and re.search(reason, said.replace(mirror.url, ""))
    assert "\x1b" not in capfd.readouterr().err and mirror.n_sent < 40_000_000  # of 65 MB
    assert len(mirror.pauses) < n_tries and sum(mirror.pauses) < 20  # seconds
    assert len(mirror.pauses) == 4 or fault not in ("408", "429", "500", "503", "hangs up")
    assert name != DATA or (mirror.folder / f"{DATA}.part").read_bytes() == part
    assert sum(path.stat().st_size for path in mirror.folder.iterdir()) < 10_000_000
    mirror.faults.clear()
    mirror.download()  # nothing stands in the way of a later run, and this file is not there yet
    assert mirror.requests[-1][0] == name


WRONG = {  # (model, file): what stands in it in the place of what
    ("124M", DATA): (b"\xbd", b"\xbe"),
    ("124M", "model.ckpt.index"): (b"some", b"same"),
    ("355M", "encoder.json"): (b"2046", b"2045"),
    ("355M", "vocab.bpe"): (b"\nh e\n", b"\nh i\n"),
    ("355M", "hparams.json"): (b'"n_head": 1', b'"n_head": 2'),
    ("355M", "checkpoint"): (b"model.ckpt", b"model-ckpt"),
    ("355M", "model.ckpt.index"): (b"\x75\x47\xdb", PAGE),
}


@pytest.mark.parametrize(("size", "name"), WRONG)
def test_a_wrong_file_never_gets_its_name(mirror, size, name):
    mirror.folder = mirror.folder.with_name(size)
    right, mirror.files[name] = mirror.files[name], mirror.files[name].replace(*WRONG[size, name])
    assert f"{mirror.url}/{size}/{name}" in mirror.download_fails() and not (mirror.folder / name).exists()
    mirror.files[name] = right
    mirror.download()


URLS = {  # (GPT2_MODELS_URL, the environment, what is said, how many tries at most)
    "no scheme": ("127.0.0.1/models", {}, "GPT2_MODELS_URL.*https?://", 1),
    "ftp": ("ftp://127.0.0.1/models", {}, "GPT2_MODELS_URL.*https?://", 1),
    "nobody listens": ("http://127.0.0.1:1", {}, "^(?!.*proxy).*refused", 5),
    "no such proxy": ("http://not.invalid", {"http_proxy": "http://127.0.0.1:1"}, "proxy.*refused", 5),
    "a proxy that says no": ("https://not.invalid", {"https_proxy": "http://{}"}, "proxy.*407", 5),
}


@pytest.mark.parametrize("case", URLS)
def test_an_address_that_leads_nowhere_is_named(mirror, monkeypatch, case):
    url, proxies, reason, n_tries = URLS[case]
    for name, value in {"GPT2_MODELS_URL": url, "NO_PROXY": "", "no_proxy": "", **proxies}.items():
        monkeypatch.setenv(name, value.format(f"127.0.0.1:{mirror.server_port}"))
    try:
        raise KeyError("another error")
    except KeyError:
        said = mirror.download_fails()
    assert url in said and re.search(reason, said) and not re.search("another|Errno", said)
    assert len(mirror.pauses) < n_tries


def test_a_certificate_of_one_s_own_is_named_at_once_and_believed_if_its_authority_is(mirror, tmp_path, monkeypatch):
    authority, tls = pytest.importorskip("trustme").CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    server = Server(mirror.files, tls)
    monkeypatch.setenv("GPT2_MODELS_URL", server.url)
    assert re.search("certificate", mirror.download_fails()) and mirror.pauses == server.requests == []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    mirror.download()
    server.shutdown()
    server.server_close()


def test_a_disk_without_locks_is_no_matter(mirror, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", Mock(side_effect=OSError("no locks")))
    mirror.download()


def test_progress_is_shown_on_a_terminal(mirror, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    stderr.isatty = lambda: True
    mirror.download()
    assert "100%" in stderr.getvalue()


@pytest.mark.parametrize("end", ["kill -9", "Ctrl-C", "itself"])
def test_a_second_run_waits_and_goes_on_where_the_first_one_is_ended_by(mirror, end):
    pytest.importorskip("fcntl")
    mirror.faults[DATA], runs = iter(["stops sending"]), []
    for _ in range(2):
        runs.append(mirror.start("utils.run(lambda: utils.download_gpt2_files('355M', '~/new/models/355M'))"))
        assert mirror.stopped.wait(60) and runs[-1].stderr.readline().startswith("fetching")
    with pytest.raises(subprocess.TimeoutExpired):
        runs[1].wait(0.3)
    by = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT}.get(end)
    runs[0].send_signal(by) if by else mirror.go.set()
    assert [run.communicate(timeout=60)[0] for run in runs] == ["", ""]
    assert [run.returncode for run in runs] == [-(by or 0), 0]
    last = [start for _, start in mirror.requests[6:]]  # 60 % of the data file are sent, and nearly all of it written
    assert SIZE // 2 < last[0] <= SIZE * 6 // 10 if by else last == []
    mirror.download()
