"""A mirror of the released models for the tests. It answers well, or with a fault that has a name."""

import gzip
import http.server
import itertools
import math
import threading
from collections import namedtuple
from unittest.mock import Mock

import utils

PAGE = b"<html>Log in first</html>"
RED = "\x1b[31mred\x1b[0m"  # a terminal that gets this paints what follows
# status: None if nothing but body is sent. length: by default that of body; False: none is sent. end: how many bytes of
# body are sent. stop: after so many it waits until server.go is set.
Answer = namedtuple("Answer", "status headers body length end stop", defaults=[{}, PAGE, None, None, None])


def good(file, start):
    """The whole file, or what it has from start on."""
    if start >= len(file):
        return Answer(416, {"Content-Range": f"bytes */{len(file)}"}, b"")
    headers = {"Content-Range": f"bytes {start}-{len(file) - 1}/{len(file)}"}
    return Answer(206, headers, file[start:]) if start else Answer(200, {}, file)


def endless(answer):
    return answer._replace(body=itertools.chain([answer.body], itertools.repeat(bytes(2**16), 1000)), length=False)


FAULTS = {  # name: function of the file and of where to start
    "hangs up": lambda file, start: Answer(None, body=b""),
    "is no web server": lambda file, start: Answer(None, body=f"SSH-2.0 {RED}\r\n".encode()),
    "breaks off": lambda file, start: good(file, start)._replace(end=50_000),
    "sends no byte": lambda file, start: good(file, start)._replace(end=0),
    "stops sending": lambda file, start: good(file, start)._replace(stop=len(file) * 6 // 10 - start),
    "sends all again": lambda file, start: good(file, 0),
    "sends all again and breaks off": lambda file, start: good(file, 0)._replace(end=50_000),
    "sends another place": lambda file, start: good(file, start + 1),
    "sends no place": lambda file, start: good(file, start)._replace(headers={}),
    "sends it zipped": lambda file, start: Answer(200, {"Content-Encoding": "gzip"}, gzip.compress(file)),
    "sends a page": lambda file, start: Answer(200),
    "sends a page of untold length": lambda file, start: Answer(200, body=PAGE * 5000, length=False),
    "sends a page as the rest": lambda file, start: good(file[:start] + PAGE, start),
    "sends a page for ever": lambda file, start: endless(Answer(200)),
    "sends the rest and more for ever": lambda file, start: endless(good(file, start)),
    "says that all is there": lambda file, start: Answer(416, {"Content-Range": f"bytes */{start}"}),
    "has a reason in red": lambda file, start: Answer(f"404 {RED}"),
    "has a length in red": lambda file, start: Answer(200, {"Content-Length": RED}, length=False),
    "has a place in red": lambda file, start: Answer(206, {"Content-Range": f"bytes {start}-{RED}"}),
    "sends elsewhere": lambda file, start: Answer(302, {"Location": "?moved"}),
    "sends elsewhere, in red": lambda file, start: Answer(302, {"Location": f"gopher{RED}://nowhere/"}),
    **{str(n): lambda file, start, n=n: Answer(n) for n in (304, 400, 401, 403, 404, 408, 410, 416, 429, 500, 503)},
}


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds
    log_message = Mock()

    def do_GET(self):
        assert self.headers["Accept-Encoding"] == "identity"  # else the server hangs up, and the test fails
        path, _, is_moved = self.path.partition("?")
        name = path.rpartition("/")[2]
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.requests.append((name, start))
        fault = None if is_moved else next(self.server.faults.get(name, iter(())), None)
        self.send(FAULTS.get(fault, good)(self.server.files[name], start))

    def do_CONNECT(self):
        self.send(Answer(f"407 {RED}"))

    def send(self, answer):
        code, _, reason = str(answer.status).partition(" ")
        if answer.status:
            self.send_response(int(code), reason or None)
            length = [] if answer.length is False else [("Content-Length", answer.length or len(answer.body))]
            for header in [*answer.headers.items(), *length]:
                self.send_header(*header)
            self.end_headers()
        for piece in [answer.body] if isinstance(answer.body, bytes) else answer.body:
            self.wfile.write(piece[: answer.end][: answer.stop])
            self.server.n_sent += len(piece)
            if answer.stop:
                self.server.stopped.set()
                self.server.go.wait(60)
                self.wfile.write(piece[answer.stop :])


class Server(http.server.ThreadingHTTPServer):
    """faults: {name of a file: iterator of names in FAULTS}, one for each request; then the server is good."""

    handle_error = Mock()  # the other side is gone

    def __init__(self, files, tls=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.n_sent = files, {}, [], 0  # requests: (name, where to start)
        self.stopped, self.go = threading.Event(), threading.Event()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}/models"
        self.socket = tls.wrap_socket(self.socket, server_side=True) if tls else self.socket
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


def varint(n):
    return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)


def index_of(hparams):
    """An index as TensorFlow writes it, as far as it tells where each tensor is in the data file."""
    index, offset = b"", 0
    for name, shape in utils.tensor_shapes(hparams).items():
        place = b"\x20" + varint(offset) if offset else b""
        index += name.encode() + b"\x08\x01" + place + b"\x28" + varint(4 * math.prod(shape)) + b"\x35some"
        offset += 4 * math.prod(shape)
    return index + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the last eight bytes of any index
