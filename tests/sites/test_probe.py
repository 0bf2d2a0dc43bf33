"""What is wrong between a site and its hub is one line with the way out: certificate, clock, plain HTTP, door."""

import re
import ssl
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("cryptography", reason="keys come with fedproxy[flower]")

from fedproxy.errors import ConfigError
from fedproxy.sites import keys
from fedproxy.sites.probe import probe


class Door(BaseHTTPRequestHandler):
    health, control, off = 200, 404, 0.0

    def do_GET(self):
        known = {"/health": self.health, "/v1/control/start-run": self.control}
        self.send_response_only(known.get(self.path, 404))
        self.send_header("Date", formatdate(time.time() + self.off, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys.make_authority(folder)
    return folder


@pytest.fixture
def door(authority):
    started = []

    def start(hosts=("localhost",), days=10, tls=True, listen="127.0.0.1", **facts):
        handler = type("Handler", (Door,), {"protocol_version": "HTTP/1.1", **facts})
        server = HTTPServer((listen, 0), handler)
        if tls:
            keys.make_certificate(authority, list(hosts), days=days)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(authority / "hub.crt", authority / "hub.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"localhost:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()


def bad(found):
    return [str(finding) for finding in found if not finding.ok]


def test_a_hub_that_is_well_is_found_well(door, authority):
    found = probe(door(), authority / "ca.crt")
    assert [finding.what for finding in found] == ["certificate", "connection", "clock", "front door"]
    assert bad(found) == []


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"days": -1}, "FAIL certificate: the hub's has expired; its owner makes a new one by hub init"),
        ({"tls": False}, "FAIL connection: .* speaks plain HTTP, or is no hub's front door"),
        ({"off": -600.0}, r"FAIL clock: this machine's is \+(599|600|601) s off the hub's; set it"),
        ({"off": 600.0}, r"FAIL clock: this machine's is -(599|600|601) s off the hub's; set it"),
        ({"control": 200}, "FAIL front door: publishes more than /v1/fleet/: whoever reaches it can start runs"),
        ({"control": 405}, "FAIL front door: publishes more than /v1/fleet/"),
        ({"health": 502}, "FAIL connection: the front door answers, and Flower's SuperLink behind it does not"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_way_out(facts, line, door, authority):
    began = time.monotonic()
    (said,) = bad(probe(door(**facts), authority / "ca.crt"))
    assert re.match(line, said), said
    assert time.monotonic() - began < 30


def test_a_hub_of_another_authority_is_not_believed(door, tmp_path):
    keys.make_authority(tmp_path)
    (said,) = bad(probe(door(), tmp_path / "ca.crt"))
    assert "not signed by the ca.crt given here" in said


def test_a_name_that_the_certificate_does_not_hold_is_named(door, authority):
    port = door(listen="127.0.0.2").rpartition(":")[2]
    (said,) = bad(probe(f"127.0.0.2:{port}", authority / "ca.crt"))
    assert "not for '127.0.0.2'" in said


@pytest.mark.parametrize("address", ["localhost:1", "no.such.host.invalid:8443", "localhost:x"])
def test_a_hub_that_is_not_there_is_one_line(address, authority):
    (said,) = bad(probe(address, authority / "ca.crt"))
    assert "does not answer" in said


def test_no_certificate_is_one_line(tmp_path):
    (said,) = bad(probe("localhost:1", tmp_path / "ca.crt"))
    assert "ask the hub's owner for ca.crt" in said
    with pytest.raises(ConfigError, match="ask the hub's owner for it"):
        keys.expires(tmp_path / "ca.crt")


@pytest.mark.parametrize("most", [0, 1])
def test_keys_whose_making_was_cut_short_are_made_again(most, tmp_path, monkeypatch):
    """A key without its certificate, or without its public half, would never be made again, since it is there."""
    write, left = keys.write_bytes, [most]

    def killed(*words, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return write(*words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(keys, "write_bytes", killed)
        for make, place in ((keys.make_authority, tmp_path), (keys.make_site_key, tmp_path / "site")):
            left[0] = most
            with pytest.raises(KeyboardInterrupt):
                make(place)
    keys.make_authority(tmp_path)
    keys.make_site_key(tmp_path / "site")
    keys.make_certificate(tmp_path, ["localhost"])
    keys.check_public_key(tmp_path / "site.pub")


def test_private_keys_are_their_owners_alone_and_are_not_taken_for_public_ones(tmp_path):
    keys.make_site_key(tmp_path / "keys" / "site")
    before = (tmp_path / "keys/site").read_bytes()
    keys.make_site_key(tmp_path / "keys" / "site")
    assert (tmp_path / "keys/site").read_bytes() == before
    assert (tmp_path / "keys/site").stat().st_mode & 0o077 == 0
    assert keys.check_public_key(tmp_path / "keys/site.pub").startswith(b"ecdsa-sha2-nistp384 ")
    with pytest.raises(ConfigError, match="a private key, which never leaves its site"):
        keys.check_public_key(tmp_path / "keys/site")
    (tmp_path / "x.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match="is not a site's public key"):
        keys.check_public_key(tmp_path / "x.pub")
