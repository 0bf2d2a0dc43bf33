"""The user that Flower's programs run as, so that they cannot read the rows, and what it is given."""

import os
import pwd
import stat
import subprocess
from pathlib import Path

from fedproxy.errors import ConfigError, one_line
from fedproxy.files import write_bytes

_REACH_S = 30.0


def other_user(name: str) -> pwd.struct_passwd:
    """Return the user that a program is started as in place of this one.

    Raises:
        ConfigError: If there is none of this name, it is who starts the site, or this process may not.
    """
    try:
        known = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"there is no user {one_line(name, 40)!r}; make one, or leave relay_user empty") from None
    if known.pw_uid in (0, os.geteuid()):
        raise ConfigError(
            f"relay_user={name!r} is who starts the site, or root, and reads its rows; name a user that cannot"
        )
    if os.geteuid() != 0:
        raise ConfigError(f"only root can start Flower as user {name!r}; start as root, or leave relay_user empty")
    return known


def handed_over(user: str, folder: Path, key: Path, ca: Path) -> tuple[Path, Path, Path]:
    """Give Flower's own user what it needs beside the site's folder: key, certificate and a folder for Flower's files.

    The user may read the first two and write into the last alone: the folder around them is this process's, which
    never writes into a folder of the user's, nor through a link.

    Args:
        user: Its name.
        folder: The site's folder.
        key: The site's private key.
        ca: Certificate of the hub's authority.

    Returns:
        The folder for Flower's files, and where key and certificate lie now.

    Raises:
        ConfigError: If that cannot be done.
    """
    known = other_user(user)
    place = folder.with_name(f"{folder.name}_{user}")
    try:
        for path in (place, home := place / "flower"):
            path.mkdir(mode=0o700, exist_ok=True)
            found = os.lstat(path)
            owners = (os.geteuid(),) if path == place else (os.geteuid(), known.pw_uid)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners:
                raise ConfigError(f"relay_user={user!r}: {path} is not a folder of this process's own; remove it")
        os.chown(home, known.pw_uid, known.pw_gid, follow_symlinks=False)
        copies = [write_bytes(place / source.name, source.read_bytes(), private=True) for source in (key, ca)]
        for copy in copies:
            os.chown(copy, -1, known.pw_gid, follow_symlinks=False)
            copy.chmod(0o640)
        os.chown(place, -1, known.pw_gid, follow_symlinks=False)
        place.chmod(0o750)
    except OSError as error:
        raise ConfigError(f"relay_user={user!r}: its folder {place} cannot be made ({one_line(error)})") from error
    _check_reach(known, copies[0])
    return home, copies[0], copies[1]


def _check_reach(user: pwd.struct_passwd, key: Path) -> None:
    """Let the user open its key.

    Raises:
        ConfigError: If it cannot.
    """
    done = subprocess.run(
        ["test", "-r", str(key)],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        cwd="/",
        timeout=_REACH_S,
        check=False,
    )
    if done.returncode:
        above = "let it enter the folders above (chmod o+x), or put the site elsewhere"
        raise ConfigError(f"relay_user={user.pw_name!r} cannot reach {key}; {above}")
