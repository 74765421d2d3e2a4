"""A page to play with a trained run: captions of any image, and where the decoder looked.

    python demo.py runs/toy                    then open http://127.0.0.1:8000
    python demo.py runs/toy runs/unmasked      the same image, by several runs side by side

Choose a scene, an example (a validation image) or an upload. The page (evaluation/demo.html) shows
the kept patches, the caption with the probability of each token, and the attention as the decoder
generated a token. Only runs with the method's decoder can be shown.

The server is the standard library's, and it has three answers: the page, the captions of an image,
and a sentence that says what is wrong. A request cannot name a file: it has an image, or an
example's number. The server listens on this machine alone unless --host says otherwise.
"""
import argparse
import contextlib
import io
import json
import os
import re
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import numpy as np
from PIL import Image

from caption import read_captioner
from evaluation.explain import Explainer
from inputs import images, opening, sources
from interop.encoder import load_pixels
from runtime import checkpoint
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.errors import BadSample, CommandParser, ConfigError, UserError, run_command
from runtime.html_page import data_uri, source_hash

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluation", "demo.html")
MAX_UPLOAD_BYTES = 10 << 20
MAX_UPLOAD_PIXELS = 25_000_000
NUM_EXAMPLES = 8
SECONDS = 10         # that a client may be silent
LARGEST = (1 << 31) - 1


class BadRequest(UserError):
    """What the browser sent cannot be used; the message says why."""


class WholeNumber(NamedTuple):
    """A parameter of a request."""
    name: str
    lowest: int
    highest: int

    def read(self, query: dict[str, list[str]]) -> int | None:
        """Its value, None where it is absent. BadRequest for anything else."""
        if self.name not in query:
            return None
        text = query[self.name][-1]
        if not re.fullmatch("[0-9]{1,10}", text) or not self.lowest <= int(text) <= self.highest:
            raise BadRequest(f"{self.name} must be a whole number from {self.lowest} to "
                             f"{self.highest}.")
        return int(text)


# ------------------------------------------------------------------------------------ answers
class Demo:
    """The runs, and what the page gets of them."""

    def __init__(self, paths: list[str]):
        self.explainers = [Explainer(read_captioner(path)) for path in paths]
        self.names = run_names(paths)
        self.lock = threading.Lock()  # one image at a time, which bounds the memory
        self.source, self.examples = self.open_examples()
        self.numbers = [WholeNumber("run", 0, len(paths) - 1), WholeNumber("keep", 1, 100),
                        WholeNumber("draw", 0, LARGEST), WholeNumber("scene", 0, LARGEST),
                        WholeNumber("example", 0, len(self.examples) - 1)]
        for n in range(len(paths)):  # compiles, so that the first click need not wait
            self.answer({"run": [str(n)], "scene": ["0"]}, b"")

    def open_examples(self) -> tuple[Any, dict[int, str]]:
        """The first run's validation images and, by number, the previews of those it can read."""
        previews = {}
        try:
            source = opening.open_validation_data(self.explainers[0].captioner.settings)
            for i in range(min(NUM_EXAMPLES, len(source))):
                with contextlib.suppress(BadSample):  # the others can be shown
                    previews[i] = png(load_pixels(source.image(i), 96))
        except (UserError, OSError) as problem:
            print(f"no examples, because the images of {self.names[0]} cannot be read ({problem})")
            return None, {}
        return source, previews

    def read_sample(self, source: Any, index: int, resolution: int) -> tuple[np.ndarray, str]:
        """(R,R,3) and the true caption. BadRequest, without the path, if the files have changed."""
        try:
            return load_pixels(source.image(index), resolution), source.caption(index)
        except (UserError, OSError) as problem:
            print(f"{source.name(index)}: {problem}", file=sys.stderr)
            raise BadRequest("This example can no longer be read.") from None

    def page_facts(self) -> dict[str, Any]:
        """What the page knows from the start."""
        runs = [{"name": name, "keep": explainer.captioner.settings.keep_ratio,
                 "patches": explainer.num_patches}
                for name, explainer in zip(self.names, self.explainers)]
        previews = list(self.examples.values())
        return {"runs": runs, "examples": previews, "max_bytes": MAX_UPLOAD_BYTES}

    def answer(self, query: dict[str, list[str]], body: bytes) -> dict[str, Any]:
        """The captions of one image by one run: of a scene, an example, or the bytes of an upload.
        BadRequest, BadSample where there is no usable image."""
        values = {number.name: number.read(query) for number in self.numbers}
        number = values["run"] or 0
        explainer = self.explainers[number]
        settings, resolution = explainer.captioner.settings, explainer.captioner.resolution
        with self.lock:
            source, index = self.source, dict(enumerate(self.examples)).get(values["example"])
            if values["scene"] is not None:
                field = settings.caption_field if settings.data == "scenes" else "txt"
                source, index = sources.SceneSource(0, "val", None, field), values["scene"]
            if index is None:
                source, pixels, truth = None, load_pixels(read_upload(body), resolution), ""
            else:
                pixels, truth = self.read_sample(source, index, resolution)
            answer = explainer.explain(pixels, (values["keep"] or 0) / 100, values["draw"] or 0)
        answer["name"], answer["image"] = self.names[number], png(pixels)
        patch = explainer.captioner.encoder.patch_size
        answer["covered"] = resolution // patch * patch / resolution  # share of a side with patches
        if truth:
            answer["truth"] = truth
        if isinstance(source, sources.SceneSource) and settings.data == "scenes":
            answer["score"] = source.grade(answer["caption"], index)
        return answer


def run_names(paths: list[str]) -> list[str]:
    """The last part of each path; numbered where two are the same."""
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    return [f"{name} ({n + 1})" if names.count(name) > 1 else name for n, name in enumerate(names)]


def read_upload(body: bytes) -> Image.Image:
    """BadRequest or BadSample says why the bytes are no usable image."""
    if not body:
        raise BadRequest("The upload is empty: choose an image file.")
    image = images.open_image(io.BytesIO(body))
    if image.width * image.height > MAX_UPLOAD_PIXELS:
        raise BadRequest(f"The image has {image.width * image.height:,} pixels, and the demo reads "
                         f"at most {MAX_UPLOAD_PIXELS:,}: make it smaller.")
    return image


def png(pixels: np.ndarray) -> str:
    """(R,R,3) uint8 as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return data_uri(file.getvalue())


# ------------------------------------------------------------------------------------- server
class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], demo: Demo):
        super().__init__(address, Handler)
        self.host, self.demo = address[0], demo
        with open(PAGE, encoding="utf-8") as file:
            page = file.read()
        facts = json.dumps(demo.page_facts()).replace("<", "\\u003c")  # it is inside an element
        script = re.search("<script>(.*?)</script>", page, re.S)[1]
        style = re.search("<style>(.*?)</style>", page, re.S)[1]
        self.page = page.replace("{}", facts, 1).encode()
        self.policy = (f"default-src 'none'; script-src {source_hash(script)}; style-src "
                       f"{source_hash(style)}; img-src data: blob:; connect-src 'self'; "
                       "frame-ancestors 'none'; base-uri 'none'; form-action 'none'")


class Handler(BaseHTTPRequestHandler):
    """Answers one request. `server` is a Server."""
    timeout = SECONDS
    server_version, sys_version = "demo", ""
    error_message_format = "%(message)s.\n"
    error_content_type = "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        if not self.is_own_host():
            return
        if self.path.partition("?")[0] == "/":
            self.send(200, self.server.page, "text/html; charset=utf-8")
        else:
            self.send_problem(404, "There is nothing at this address: the page is at /.")

    def do_POST(self) -> None:
        if not self.is_own_host():
            return
        try:
            path, _, query = self.path.partition("?")
            body = self.read_body()
            if path != "/caption":
                raise BadRequest("There is nothing at this address: the page is at /.")
            answer = self.server.demo.answer(parse_qs(query, keep_blank_values=True), body)
        except (BadRequest, BadSample) as problem:
            self.send_problem(400, str(problem))
        except TimeoutError:
            self.send_problem(408, "The upload stopped before its end: send it again.")
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            self.send_problem(500, "The model failed with this image; the terminal has the reason.")
        else:
            self.send(200, json.dumps(answer).encode(), "application/json")

    def is_own_host(self) -> bool:
        """Whether the request names this server, which a page of another site does not whose name
        points here, and comes from the page of this server. Answers the request if not."""
        host = self.headers.get("Host", "")
        is_own = re.sub(r":\d*$", "", host) in ("127.0.0.1", "localhost", self.server.host)
        own_origins = None, f"http://{host}", f"https://{host}"  # https: of a forwarder
        if (is_own or self.server.host == "0.0.0.0") and self.headers.get("Origin") in own_origins:
            return True
        self.send_problem(403, "This server answers its own page alone.")
        return False

    def read_body(self) -> bytes:
        """BadRequest for one that is too long, or of unknown length."""
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", text):
            raise BadRequest("The request does not say how long it is.")
        length = int(text)
        if length <= MAX_UPLOAD_BYTES:
            body = self.rfile.read(length)
            if len(body) < length:
                raise BadRequest("The upload stopped before its end: send it again.")
            return body
        remaining = min(length, 8 * MAX_UPLOAD_BYTES)
        while remaining > 0 and self.rfile.read(min(remaining, 1 << 16)):
            remaining -= 1 << 16  # a browser reads the answer only after it has sent all
        raise BadRequest(f"The file has {length:,} bytes, and the demo reads at most "
                         f"{MAX_UPLOAD_BYTES:,}: make it smaller.")

    def send_problem(self, status: int, sentence: str) -> None:
        sentence = sentence[:1].upper() + sentence[1:]
        self.send(status, json.dumps({"error": sentence}).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))),
                            ("Content-Security-Policy", self.server.policy),
                            ("X-Content-Type-Options", "nosniff"),
                            ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass  # a line for each request says nothing here

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the browser has left
            super().handle()


# ------------------------------------------------------------------------------------ command
def serve(args: argparse.Namespace) -> int:
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} is no port: give a number from 0 to 65535")
    tune_cpu(checkpoint.model_size(args.runs[0]))
    enable_compilation_cache()
    demo = Demo(args.runs)
    try:
        server = Server((args.host, args.port), demo)
    except OSError as problem:
        raise ConfigError(f"--host {args.host} --port {args.port} cannot be used "
                          f"({problem.strerror or problem}): change one of them") from None
    host, port = server.server_address[:2]
    print(f"open http://{host}:{port} in a browser; Ctrl-C ends the demo", flush=True)
    with server:
        server.serve_forever()
    return 0


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="demo.py",
                           description="Serve a page with the captions of trained runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument("--port", type=int, default=8000,
                        help="0 for any that is free (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="who may connect: 0.0.0.0 for everyone "
                        "who reaches this machine (default: 127.0.0.1, this machine alone)")
    return run_command(serve, parser.parse_args(argv))


if __name__ == "__main__":
    images.silence_pillow()
    sys.exit(main(sys.argv[1:]))
