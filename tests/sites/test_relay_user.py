"""Flower's own user: it reaches the socket, its key and its own folder, and nothing else of a site."""

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedproxy.errors import ConfigError
from fedproxy.sites.programs import Program
from fedproxy.sites.relay_user import handed_over, other_user
from fedproxy.sites.service import Service
from fedproxy.wire.frames import NOTHING

from .fake_courier import waited

USER = "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as another user")
ASK = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2]))
place = socket.socket(socket.AF_UNIX)
place.settimeout(10)
place.connect(sys.argv[1])
place.sendall(b'{"size":0}\\n')
print(place.makefile("rb").readline().decode())
"""


@pytest.fixture
def site():
    """Return a site's folder with a key, below a folder that everybody may enter."""
    above = Path(tempfile.mkdtemp())
    above.chmod(0o755)
    (above / "ward").mkdir(mode=0o700)
    (above / "ward/key").write_text("secret")
    (above / "ward/rows").write_text("Mrs Miller")
    (above / "ca.crt").write_text("authority")
    yield above / "ward"
    shutil.rmtree(above)


def given(site):
    return handed_over(USER, site, site / "key", site.parent / "ca.crt")


def as_user(*command):
    known = pwd.getpwnam(USER)
    ids = {"user": known.pw_uid, "group": known.pw_gid, "extra_groups": []}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd="/", check=False, **ids)


@as_root
def test_the_user_reads_key_and_authority_writes_its_own_folder_and_nothing_else(site):
    home, key, ca = given(site)
    assert given(site) == (home, key, ca)
    assert as_user("cat", key, ca).stdout == "secretauthority"
    assert as_user("touch", home / "x").returncode == 0
    for denied in (("cat", site / "rows"), ("ls", site), ("touch", home.parent / "x"), ("rm", "-f", key)):
        assert as_user(*denied).returncode != 0, denied
    for path, mode in ((home.parent, 0o750), (key, 0o640), (ca, 0o640)):
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (0, mode)


@as_root
def test_links_that_the_user_leaves_change_nothing_elsewhere(site):
    home, *_ = given(site)
    (site / "rows").chmod(0o600)
    assert as_user("ln", "-s", site / "rows", home / "link").returncode == 0
    given(site)
    assert (site / "rows").stat().st_uid == 0
    assert (site / "rows").read_text() == "Mrs Miller"


@as_root
@pytest.mark.parametrize("made", ["folder_of_its_own", "link"])
def test_a_folder_that_is_the_users_or_a_link_is_refused(made, site):
    place = site.with_name(f"{site.name}_{USER}")
    if made == "link":
        place.symlink_to(site)
    else:
        place.mkdir()
        os.chown(place, pwd.getpwnam(USER).pw_uid, -1)
    with pytest.raises(ConfigError, match="is not a folder of this process's own; remove it"):
        given(site)
    assert not (site / "flower").exists()


@as_root
def test_a_folder_that_the_user_cannot_reach_is_refused_with_the_way_out(site):
    site.parent.chmod(0o700)
    with pytest.raises(ConfigError, match=f"relay_user='{USER}' cannot reach .*; let it enter the folders above"):
        given(site)


@as_root
def test_the_user_reaches_the_socket_wherever_the_site_lies(site):
    service = Service(lambda head, path: ({"ok": 1}, NOTHING), site / "socket", USER)
    try:
        known = pwd.getpwnam(USER)
        words = [str(service.path), str(known.pw_uid), str(known.pw_gid)]
        done = subprocess.run([sys.executable, "-I", "-c", ASK, *words], capture_output=True, text=True, timeout=30)
        assert json.loads(done.stdout or "{}") == {"ok": 1, "size": 0}, done.stderr
        assert as_user("ls", service.path.parent).returncode != 0
        assert stat.S_IMODE(service.path.parent.stat().st_mode) == 0o710
    finally:
        service.close()
    assert not service.path.parent.exists()


@as_root
def test_a_program_runs_as_the_user_without_roots_groups(site, monkeypatch):
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or as_user(python, "-I", "-c", "").returncode:
        pytest.skip("there is no Python that everybody may run")
    monkeypatch.setattr(sys, "executable", python)
    program = Program("id", ["id"], {"PATH": os.environ["PATH"]}, site / "log", user=USER)
    program.start()
    waited(lambda: not program.runs)
    known = pwd.getpwnam(USER)
    said = (site / "log").read_text()
    assert said.startswith(f"uid={known.pw_uid}({USER}) gid={known.pw_gid}")
    assert "(root)" not in said


@as_root
def test_a_program_that_the_user_may_not_run_is_named(site, monkeypatch):
    (site / "python").write_text("")
    monkeypatch.setattr(sys, "executable", str(site / "python"))
    with pytest.raises(ConfigError, match=f"user '{USER}' must be able to run .*python"):
        Program("id", ["id"], {}, site / "log", user=USER).start()


@pytest.mark.parametrize(
    ("name", "line"),
    [("no such user", "there is no user 'no such user'"), ("root", "is who starts the site, or root")],
)
def test_a_user_that_keeps_nothing_apart_is_refused(name, line):
    with pytest.raises(ConfigError, match=line):
        other_user(name)


def test_who_is_not_root_cannot_start_flower_as_another_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match=f"only root can start Flower as user '{USER}'"):
        other_user(USER)
