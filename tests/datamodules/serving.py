"""A web server of files on the loopback that behaves as well or as badly as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """What is served and how: `ranges` or whole files only; of `faults`, every third request meets the next one."""

    def __init__(self, folder: Path, ranges: bool, faults: list[str]) -> None:
        self.folder, self.ranges, self.faults = folder, ranges, faults
        self.requests: list[str] = []  # "path range"
        self.connections = 0
        self.lock = threading.Lock()
        self.url = ""

    def fault(self, request: str) -> str:
        with self.lock:
            self.requests.append(request)
            return self.faults[len(self.requests) // 3 % len(self.faults)] if len(self.requests) % 3 == 0 else ""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with server.lock:
                server.connections += 1

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            fault = (
                server.fault(f"{self.path} {asked}")
                if server.faults
                else server.requests.append(f"{self.path} {asked}")
            )
            path = server.folder / self.path.split("?")[0].lstrip("/")
            if fault == "500" or not path.is_file():
                self.send_response(500 if fault else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, total = path.read_bytes(), path.stat().st_size
            if server.ranges and asked:
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                if first >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(folder: Path, ranges: bool = True, faults: list[str] | None = None) -> Iterator[Server]:
    server = Server(folder, ranges, faults or [])
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
