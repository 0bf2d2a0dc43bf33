"""Weights that lie in mapped files: their memory given back while the model stays as it is.

transformers maps safetensors files instead of reading them, as long as a model is loaded in the precision of its files.
A weight then takes memory from its first use until the model goes, and it need not: the file has the same bytes.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_SLACK = 1 << 26
"""Bytes that may come into memory before it is worth a look which of them can go."""
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S{4} .*\.safetensors( \(deleted\))?$")


class _Seen:
    """How many bytes of files were in memory when memory was last given back."""

    file_bytes = 0


def release() -> None:
    """Give back the memory of mapped weights; each page is read from its file again when it is next used.

    Nothing that was written into a mapped weight is lost: its whole file then stays in memory. Other threads must not
    write into weights meanwhile. Weights in ordinary memory stay, and systems other than Linux keep all.
    """
    if sys.platform != "linux":
        return
    if _file_bytes() - _Seen.file_bytes < _SLACK:
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in list(_untouched()):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    _Seen.file_bytes = _file_bytes()


def trim() -> None:
    """Give back ordinary memory that was freed: the C library keeps what lies below memory that is in use (glibc)."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def _file_bytes() -> int:
    """Return the bytes of files that are in this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def _untouched() -> Iterator[tuple[int, int]]:
    """Yield the address ranges of mapped weights into which nothing was written."""
    found = None
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line[0] in "0123456789abcdef":
                found = _MAPPING.match(line.rstrip("\n"))
            elif found and line.startswith("Anonymous:"):  # pages of the file's that were written to are counted here
                if line.split()[1] == "0":
                    yield int(found[1], 16), int(found[2], 16)
                found = None
