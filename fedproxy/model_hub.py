"""Hugging Face's hub: asked whether it answers before its clients try for minutes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Thread
from typing import Any

import huggingface_hub.constants

_SAYS = {
    "GatedRepoError": "access to it is restricted; accept its terms on the hub and run hf auth login",
    "RepositoryNotFoundError": "the hub has no such repository, or it is private",
    "OfflineModeIsEnabled": "it is not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE)",
    "LocalEntryNotFoundError": "it is not in the hub's cache, and the hub cannot be reached",
}
_PATIENCE_S = 5
_KEPT_S = 30
"""Seconds for which an answer is taken as still true."""


@contextmanager
def hub_or_its_cache() -> Iterator[None]:
    """Where the hub does not answer, let its clients look into their caches only, without minutes of retries.

    The clients are huggingface_hub, with transformers, and datasets where it has been imported.
    """
    clients: list[Any] = [huggingface_hub.constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [client.HF_HUB_OFFLINE for client in clients]
    if not all(before) and not _answers(int(time.monotonic() // _KEPT_S)):
        for client in clients:
            client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value


def hub_says(error: BaseException) -> str | None:
    """Return what a client's error means where it, or what it comes from, is known; outside of the context above."""
    cause: BaseException | None = error
    while cause is not None:
        told = f"{type(cause).__name__}: {cause}"  # datasets names the kind in its text alone
        kind = next((kind for kind in _SAYS if kind in told), None)
        if kind == "OfflineModeIsEnabled" and not huggingface_hub.constants.HF_HUB_OFFLINE:  # the context did it
            kind = "LocalEntryNotFoundError"
        if kind is not None:
            return _SAYS[kind]
        cause = cause.__cause__ or cause.__context__
    return None


@lru_cache(maxsize=1)
def _answers(now: int) -> bool:
    """Tell whether the hub answers within five seconds, its name and all of its addresses tried; once per ``now``."""
    del now
    asking = Thread(target=_ask, args=(answers := list[object](),), daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return bool(answers)


def _ask(answers: list[object]) -> None:
    """Add the hub's answer, whatever it says, through its own client: one that is set up for proxies and the like."""
    try:
        answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE_S))
    except Exception:  # a client of any kind fails in its own way
        return
