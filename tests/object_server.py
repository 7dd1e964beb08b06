"""A real S3 server (moto) for the tests, and a network between it and a worker that a test can cut."""

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECONDS = 60.0  # that the server may take to start


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """moto's S3 server, as a process of its own. What it has is gone when it ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self._process.poll() is None, "moto's server ended"
            assert time.monotonic() < until, "moto's server did not start"
            time.sleep(0.1)

    @property
    def variables(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "a-user",
            "AWS_SECRET_ACCESS_KEY": "the-secret",
            "AWS_REGION": "us-east-1",
        }

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def request(self, method: str, path: str, body: bytes = b"") -> int:
        """The status of a request without a signature, which moto takes from everybody."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", body, {"Content-Type": "text/plain"}, method=method
        )
        try:
            with urllib.request.urlopen(asked) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def create_bucket(self, name: str) -> None:
        assert self.request("PUT", name) == 200

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Meanwhile nobody's credentials are known."""
        assert self.request("POST", "moto-api/reset-auth", b"0") == 200
        try:
            yield
        finally:
            assert self.request("POST", "moto-api/reset-auth", b"inf") == 200


class Network:
    """A port that leads to a server, until a test cuts it."""

    def __init__(self, server_port: int) -> None:
        self.port, self._server_port = free_port(), server_port
        self.cut_after: int | None = None  # bytes to the server after which each connection is cut
        self.cuts = 0  # connections that were cut in the middle of what they sent
        self.rate: float | None = None  # bytes a second to the server, of all connections together
        self._free_at, self._sending = 0.0, threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.connect()

    def connect(self) -> None:
        """Lets connections through."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def disconnect(self) -> None:
        """Cuts all connections, and refuses new ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for each in list(self._open):
            self._end(each)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open |= {client, server}
                threading.Thread(target=self._copy, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(4096):
                sent += len(piece)
                if to_server and self.cut_after is not None and sent > self.cut_after:
                    self.cuts += 1
                    break
                if to_server and self.rate is not None:
                    self._wait(len(piece) / self.rate)
                target.sendall(piece)
        self._end(source)
        self._end(target)

    def _wait(self, seconds: float) -> None:
        with self._sending:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + seconds
            until = self._free_at
        time.sleep(until - now)

    def _end(self, each: socket.socket) -> None:
        self._open.discard(each)
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


@contextlib.contextmanager
def network_to(server: Server) -> Iterator[Network]:
    """A network that is cut at the end."""
    network = Network(server.port)
    try:
        yield network
    finally:
        network.disconnect()


class _Answers(BaseHTTPRequestHandler, ABC):
    """Answers every request with what `answer` gives: status, headers, content."""

    protocol_version = "HTTP/1.1"

    @abstractmethod
    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The answer to one request, which has this `body`."""

    def do(self) -> None:
        """Sends it."""
        status, headers, content = self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do  # noqa: N815 - the library's names

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def _listening(answers: type[_Answers]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield listener.server_port
        listener.shutdown()


def _forwarded(server: Server, request: _Answers, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """What `server` answers to the `request`: status, headers, content."""
    asked = http.client.HTTPConnection("127.0.0.1", server.port)
    asked.request(request.command, request.path, body, dict(request.headers))
    answered = asked.getresponse()
    headers = {name: value for name, value in answered.getheaders() if name in ("ETag", "Last-Modified")}
    content = answered.read()
    asked.close()
    return answered.status, headers, content


@contextlib.contextmanager
def without_listing(server: Server) -> Iterator[int]:
    """The port of a server like Amazon's for those who may not list the bucket: it refuses what does not exist.

    moto knows no such right.
    """

    class Answers(_Answers):
        def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            status, headers, content = _forwarded(server, self, body)
            return (403, {}, _error("AccessDenied")) if status == 404 else (status, headers, content)

    with _listening(Answers) as port:
        yield port


@contextlib.contextmanager
def failing(server: Server, method: str, times: int, status: int, code: str) -> Iterator[int]:
    """The port of `server` that answers the first requests of this method, so many, with S3's code of an error."""
    failures = iter(range(times))

    class Answers(_Answers):
        def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            if self.command == method and next(failures, None) is not None:
                return status, {}, _error(code)
            return _forwarded(server, self, body)

    with _listening(Answers) as port:
        yield port


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """What `holding_uploads` holds."""

    port: int
    came: threading.Event  # the first one is here
    may_end: threading.Event  # set it to let them through
    ended: threading.Event  # the first one is stored


@contextlib.contextmanager
def holding_uploads(server: Server) -> Iterator[Uploads]:
    """A port of `server` where an upload takes until the test lets it end."""
    came, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    class Answers(_Answers):
        def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            if self.command != "PUT":
                return _forwarded(server, self, body)
            came.set()
            assert may_end.wait(SECONDS)
            answer = _forwarded(server, self, body)
            ended.set()
            return answer

    with _listening(Answers) as port:
        try:
            yield Uploads(port=port, came=came, may_end=may_end, ended=ended)
        finally:
            may_end.set()


@contextlib.contextmanager
def answering(status: int, code: str) -> Iterator[int]:
    """The port of a server that answers every request with this status and S3's code of an error."""

    class Answers(_Answers):
        def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            return status, {}, _error(code)

    with _listening(Answers) as port:
        yield port


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>As S3 says it.</Message></Error>".encode()
