"""Downloads from a server on this machine that does everything wrong."""

import http.server
import socket
import threading
import time
from pathlib import Path

import pytest

from utils import data, download
from utils.errors import InputError

CONTENT = bytes(range(256)) * 4000
counts: dict[str, int] = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        counts[name] = counts.get(name, 0) + 1
        if name == "missing":
            return self.send_error(404)
        if name == "broken" or (name == "once-broken" and counts[name] == 1):
            return self.send_error(503)
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            return self.end_headers()
        if name == "moved-to-a-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            return self.end_headers()
        if name == "round-and-round":
            self.send_response(302)
            self.send_header("Location", "/round-and-round")
            return self.end_headers()
        self.send_response(200)
        if name != "unannounced":
            self.send_header("Content-Length", str(len(CONTENT) + 100 * (name == "too-short")))
        self.end_headers()
        if name == "empty-unannounced":
            return None
        if name == "silent":
            time.sleep(3)
        half = len(CONTENT) // 2
        self.wfile.write(CONTENT[:half])
        if name == "cut" or (name == "once-cut" and counts[name] == 1):
            self.wfile.flush()
            return self.connection.shutdown(socket.SHUT_RDWR)
        if name == "slow":
            self.wfile.flush()
            time.sleep(0.5)
        return self.wfile.write(CONTENT[half:])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch(server, name, path):
    counts.pop(name, None)
    return download.fetch(f"{server}/{name}", path, timeout=1.5, pause=0.01)


@pytest.mark.parametrize("name", ["good", "slow", "moved", "unannounced", "once-broken", "once-cut"])
def test_what_arrives_whole(server, tmp_path, name):
    path = fetch(server, name, tmp_path / "new" / "file.npz")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.npz"], "no partial file is left behind"


@pytest.mark.parametrize(
    ("name", "words", "tries"),
    [
        ("missing", "404", 1),
        ("broken", "503", 3),
        ("cut", "", 3),
        ("too-short", "1.0 MB", 3),
        ("silent", "timed out", 3),
        ("moved-to-a-file", "", None),
        ("round-and-round", "", None),
    ],
)
def test_what_does_not(server, tmp_path, name, words, tries):
    path = tmp_path / "file.npz"
    with pytest.raises(InputError) as caught:
        fetch(server, name, path)
    message = str(caught.value)
    assert words in message and f"{server}/{name}" in message and str(path) in message and "\n" not in message
    assert list(tmp_path.iterdir()) == [], "neither the file nor a part of it"
    assert tries is None or counts[name] == tries


def test_no_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
    with pytest.raises(InputError, match=r"no connection.*put the file at"):
        download.fetch(address, tmp_path / "file", pause=0.01)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://somewhere/file", "nowhere"])
def test_only_http(tmp_path, address):
    with pytest.raises(InputError, match="not an http address"):
        download.fetch(address, tmp_path / "file")


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(server, "good", tmp_path / "file" / "inside")


def test_a_word_is_downloaded_once(server, tmp_path, monkeypatch):
    """--dataset ogbench:NAME fetches into the ogbench package's folder, and finds the file there the next time."""
    monkeypatch.setenv("OGBENCH_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("utils.ogbench_data.BASE", f"{server}/")
    monkeypatch.setattr(download.fetch, "__defaults__", (1.5, 0.01))
    counts.pop("cube.npz", None)
    assert data.resolve("ogbench:cube") == data.resolve("ogbench:cube") == tmp_path / "cube.npz"
    assert counts["cube.npz"] == 1 and Path(tmp_path / "cube.npz").read_bytes() == CONTENT
