"""The server of demo.py: what it answers, and what it refuses. tests/browser clicks the page."""
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from PIL import Image

import config
import demo
from inputs import opening
from tests.helpers.encoders import random_image, untrained_run

NAME = "<script>alert(1)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / NAME
    untrained_run(str(folder))
    with serving([str(folder)]) as server:
        yield server


@contextlib.contextmanager
def serving(paths: list[str]):
    with demo.Server(("127.0.0.1", 0), demo.Demo(paths)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(server, method: str, path: str, body: bytes = b"", **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def ask(server, query: str, body: bytes = b"") -> dict:
    status, text = request(server, "POST", f"/caption?{query}", body)
    assert status == 200, text
    return json.loads(text)


def problem(server, query: str, body: bytes = b"") -> str:
    """The sentence of a request that is refused."""
    status, text = request(server, "POST", f"/caption?{query}", body)
    assert status == 400, text
    sentence = json.loads(text)["error"]
    assert "Traceback" not in sentence and "/" not in sentence and sentence[0].isupper()
    return sentence


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(random_image(), "PNG")


def test_the_image_may_be_a_scene_an_example_or_an_upload(server):
    scene = ask(server, "scene=3")
    assert scene["truth"] and scene["score"]["exact"] in ([0, 1], [1, 1])
    assert scene["name"] == NAME and scene["image"].startswith("data:image/png")
    example = ask(server, "example=7")
    assert example["truth"] and example["truth"] != scene["truth"]
    upload = ask(server, "run=0", PNG)
    assert "truth" not in upload and "score" not in upload
    assert ask(server, "run=0", encoded(random_image(), "BMP")) == upload


def test_the_draw_and_the_keep_ratio_change_the_kept_patches(server):
    first = ask(server, "scene=3&draw=1")
    assert ask(server, "scene=3&draw=1") == first
    draws = {tuple(ask(server, f"scene=3&draw={n}")["kept"]) for n in range(6)}
    assert len(draws) > 1 and {len(kept) for kept in draws} == {3}
    counts = [len(ask(server, f"scene=3&keep={keep}")["kept"]) for keep in (1, 50, 100)]
    assert counts == [1, 4, 9]


def broken_uploads() -> dict[str, bytes]:
    """Files that are no usable image."""
    jpeg, gif = encoded(random_image(), "JPEG"), encoded(random_image(), "GIF")
    tiff, webp = encoded(random_image(), "TIFF"), encoded(random_image(), "WEBP")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    def png(width: int, height: int, pixels: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
                + chunk(b"IEND", b""))
    return {
        "empty": b"", "one byte": b"x", "text": b"a caption", "html": b"<script>alert(1)</script>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "pdf": b"%PDF-1.7", "zip": b"PK\x03\x04" + bytes(100), "zeros": bytes(10_000),
        "png signature": PNG[:8], "half a png": PNG[:len(PNG) // 2],
        "damaged png": PNG[:60] + bytes(60) + PNG[120:], "half a jpeg": jpeg[:len(jpeg) // 3],
        "jpeg header": jpeg[:20], "half a gif": gif[:40], "half a tiff": tiff[:60],
        "half a webp": webp[:len(webp) // 2], "too many pixels": png(6000, 6000, b""),
        "a bomb": png(50_000, 50_000, zlib.compress(bytes(1 << 20))),
        "no pixels": png(100, 100, zlib.compress(b"")),
        "32-bit": encoded(Image.new("F", (8, 8)), "TIFF")}


@pytest.mark.parametrize("name, body", broken_uploads().items(), ids=str)
def test_a_broken_upload_is_answered_by_a_sentence(server, name, body, capsys):
    sentence = problem(server, "run=0", body)
    assert len(sentence.split()) >= 4 and not capsys.readouterr().err
    assert ask(server, "run=0", PNG)["caption"] is not None  # and the next one is served


@pytest.mark.parametrize("query", ["scene=-1", "scene=1e3", "scene=9999999999", "scene=", "keep=0",
                                   "keep=101", "draw=x", "run=1", "example=8", "scene=²",
                                   "scene=../../etc/passwd"])
def test_wrong_numbers_are_named(server, query):
    name, _, value = query.partition("=")
    assert problem(server, f"{name}={quote(value)}").startswith(f"{name.capitalize()} must be")


def test_an_upload_may_not_be_too_long_and_must_say_how_long_it_is(server):
    assert "bytes" in problem(server, "run=0", bytes(demo.MAX_UPLOAD_BYTES + 1))
    host = "{}:{}".format(*server.server_address)
    start = f"POST /caption HTTP/1.1\r\nHost: {host}\r\n"
    for header in ("Transfer-Encoding: chunked", "Content-Length: -5", "Content-Length: 1e3"):
        assert "does not say how long" in raw(server, f"{start}{header}\r\n\r\n")
    short = f"{start}Content-Length: 50\r\n\r\nabc"
    assert "stopped before its end" in raw(server, short)


def raw(server, text: str) -> str:
    """The answer to bytes of our own, after which we send no more."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read().decode()


def test_no_file_can_be_read_and_no_path_is_told(server):
    for path in ("/etc/passwd", "/../../etc/passwd", "/demo.py", "/%2e%2e/%2e%2e/etc/passwd",
                 "/evaluation/demo.html", "//etc/passwd", "/caption", "/config.json",
                 "/?file=/etc/passwd"):
        status, text = request(server, "GET", path)
        if path.startswith("/?"):
            assert status == 200
        else:
            assert status == 404 and text.startswith('{"error": "There is nothing')
        assert "root:" not in text
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS"):
        assert request(server, method, "/")[0] == 501
    folder = server.demo.explainers[0].captioner.settings.workdir
    answers = request(server, "GET", "/")[1] + json.dumps(ask(server, "scene=1"))
    assert folder not in answers and folder.rpartition("/")[0] not in answers


def test_pages_of_other_sites_are_refused(server):
    """A name that points here (DNS rebinding), and a request that another page makes."""
    port = server.server_address[1]
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": ""}, {"Origin": "null"},
                    {"Origin": "http://evil.example"}, {"Origin": "http://localhost:1"}):
        for method, path in (("GET", "/"), ("POST", "/caption?scene=1")):
            assert request(server, method, path, **headers)[0] == 403, headers
    own = "http://{}:{}".format(*server.server_address)
    assert request(server, "POST", "/caption?scene=1", Origin=own)[0] == 200
    assert request(server, "POST", "/caption?scene=1", Host="localhost:9000")[0] == 200  # forwarded
    tunnel = {"Host": "localhost:9000", "Origin": "https://localhost:9000"}
    assert request(server, "POST", "/caption?scene=1", **tunnel)[0] == 200  # by HTTPS
    assert request(server, "POST", "/caption?scene=1", Host="127.0.0.1")[0] == 200  # port 80


def test_the_page_has_the_names_of_the_runs_as_text(server):
    status, page = request(server, "GET", "/")
    assert status == 200 and NAME not in page and "\\u003cscript>alert(1)" in page


def test_eight_at_once_all_get_their_own_answer(server):
    alone = [ask(server, f"scene={n}") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda n: ask(server, f"scene={n}"), range(8)))
    assert together == alone


def test_several_runs_answer_for_themselves(tmp_path):
    paths = [str(tmp_path / parent / "run") for parent in "ab"]
    untrained_run(paths[0])
    untrained_run(paths[1], keep_ratio=1.0, data=str(tmp_path / "absent"), caption_field="json")
    with serving(paths) as server:
        first, second = ask(server, "run=0&scene=2"), ask(server, "run=1&scene=2")
        assert (first["name"], second["name"]) == ("run (1)", "run (2)")
        assert (len(first["kept"]), len(second["kept"])) == (3, 9)
        assert "score" in first and "score" not in second  # it was not trained on scenes


def test_an_example_that_is_gone_is_refused_without_its_path(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(20):
        random_image(n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"image {n}")
    untrained_run(str(tmp_path / "run"), data=str(folder))
    with serving([str(tmp_path / "run")]) as server:
        assert len(server.demo.examples) == 2 and ask(server, "example=0")["truth"][:6] == "image "
        for path in folder.glob("*.png"):
            path.unlink()
        assert problem(server, "example=0") == "This example can no longer be read."
    assert str(folder) in capsys.readouterr().err


def test_a_broken_image_takes_no_other_example_away(tmp_path):
    for n in range(40):
        random_image(n).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"image {n}")
    untrained_run(str(tmp_path / "run"), data=str(tmp_path))
    source = opening.open_validation_data(config.Config(data=str(tmp_path)))
    first, *others = map(source.name, range(4))
    with open(first, "wb"):
        pass  # now empty
    with serving([str(tmp_path / "run")]) as server:
        truths = [ask(server, f"example={n}")["truth"] for n in range(3)]
        assert truths == ["image " + path.rpartition("/")[2][:-4] for path in others]
        assert "from 0 to 2" in problem(server, "example=3")


def test_examples_that_are_not_here_are_left_out(tmp_path, capsys):
    untrained_run(str(tmp_path / "run"), data=str(tmp_path / "absent"))
    assert demo.Demo([str(tmp_path / "run")]).examples == {}
    assert "no examples, because" in capsys.readouterr().out


def test_what_cannot_be_served_is_named(tmp_path, capsys):
    assert demo.main([str(tmp_path / "absent")]) == 1
    untrained_run(str(tmp_path / "clip"), objective="clip")
    assert demo.main([str(tmp_path / "clip")]) == 1
    untrained_run(str(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert demo.main([str(tmp_path / "run"), "--port", port]) == 1
    assert demo.main([str(tmp_path / "run"), "--port", "99999"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert "only runs of openvision2" in lines[1] and f"--port {port}" in lines[2]
    assert lines[3].endswith("--port 99999 is no port: give a number from 0 to 65535")
