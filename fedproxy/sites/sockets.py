"""Folders for Unix sockets, whose paths the system bounds to about a hundred characters."""

import shutil
import tempfile
from pathlib import Path

from fedproxy.files import private_folder

_MOST = 60
"""Most characters of a folder that holds sockets with names of 32 letters and more."""


def socket_folder(wanted: Path, *, apart: bool = False) -> Path:
    """Return an empty folder that only this user can look into: the wanted one, or a short one where that is too long.

    Args:
        wanted: Where it may lie.
        apart: Whether it is to lie in the system's folder for temporary files, since another user is to reach it and
            cannot enter the folders above ``wanted``.

    Raises:
        OSError: If it cannot be made.
    """
    if apart or len(str(wanted.absolute())) > _MOST:
        return Path(tempfile.mkdtemp(prefix="fedproxy_"))
    shutil.rmtree(wanted, ignore_errors=True)
    return private_folder(wanted).absolute()
