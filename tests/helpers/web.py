"""A web server that serves a folder by ranges, and misbehaves as a test asks it to."""
import contextlib
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves the files of `folder`. Faults apply to requests whose path contains `only`."""
    daemon_threads = True
    block_on_close = False

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = str(folder)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, int, int]] = []  # path, begin, end
        self.lock = threading.Lock()
        self.fault, self.only, self.remaining, self.delay = "", "", 0, 0.0

    def misbehave(self, fault: str, times: int = 1 << 30, only: str = "") -> None:
        self.fault, self.remaining, self.only = fault, times, only

    def next_fault(self, path: str) -> str:
        with self.lock:
            if self.remaining <= 0 or self.only not in path:
                return ""
            self.remaining -= 1
            return self.fault

    def handle_error(self, *_) -> None:
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        time.sleep(server.delay)
        fault = server.next_fault(self.path)
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "close":
            return self.connection.close()
        name = urllib.parse.unquote(self.path.partition("?")[0])
        path = os.path.join(server.folder, name.lstrip("/"))
        if not os.path.isfile(path):
            return self.send_error(404)
        stat = os.stat(path)
        size = stat.st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = int(match[1]), min(int(match[2]) + 1, size)
        if begin >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        server.requests.append((self.path, begin, end))
        if fault == "no ranges":
            self.send_response(200)
            begin, end = 0, size
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_ino:x}"')
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(begin)
            self.send_body(file.read(end - begin), fault)

    def send_body(self, data: bytes, fault: str) -> None:
        if fault == "reset":
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.connection.close()
        elif fault == "trickle":
            for n in range(len(data)):
                self.wfile.write(data[n:n + 1])
                self.wfile.flush()
                time.sleep(0.05)
        elif fault == "silence":
            time.sleep(3)
        else:
            self.wfile.write(data)


@contextlib.contextmanager
def serve(folder) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
