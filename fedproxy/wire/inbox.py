"""Files that arrive in parts: each part by its hash, the whole by its own, and a cut transfer goes on where it was."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedproxy.errors import ClientError
from fedproxy.files import file_sha256, parse_json, private_folder, read_whole, write_json

_HASH = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 1 << 20


def is_hash(text: object) -> bool:
    """Return whether this is a SHA-256 as it is written here."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


@dataclass(frozen=True)
class Piece:
    """What a part says of itself."""

    file: str
    """Hash of the whole file."""
    total: int
    """Bytes of the whole file."""
    offset: int
    """Where in it the part begins."""
    part: str
    """Hash of the part."""

    @classmethod
    def parse(cls, said: object, *, most: int) -> "Piece":
        """Return it, checked.

        Raises:
            ClientError: If it is none, or the file is larger than ``most`` bytes.
        """
        match said:
            case {"file": str(file), "total": int(total), "offset": int(offset), "part": str(part)} if (
                is_hash(file) and is_hash(part) and 0 <= offset <= total
            ):
                if total > most:
                    raise ClientError(f"a file of {total} bytes was announced, {most} are the most that is taken")
                return cls(file, total, offset, part)
        raise ClientError("a part does not say which file it is of; send it again")


class Inbox:
    """Files on their way in, and those that are whole.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)

    def whole(self, file: str) -> Path | None:
        """Return where a file lies that has arrived whole."""
        path = self.folder / file
        return path if path.is_file() else None

    def have(self, file: str) -> int:
        """Return how many bytes of a file have arrived, from its beginning."""
        path = self.whole(file)
        if path is not None:
            return path.stat().st_size
        try:
            noted = parse_json(read_whole(self._note(file), most=1 << 12), dict).get("have")
            size = self._growing(file).stat().st_size
        except (OSError, ValueError):
            return 0
        return noted if type(noted) is int and 0 <= noted <= size else 0

    def add(self, piece: Piece, data: Path) -> int:
        """Add a part and return how much of its file is there now; a part that is there already changes nothing.

        Args:
            piece: What the part says of itself.
            data: Its bytes.

        Raises:
            ClientError: If the part is damaged, or does not follow what is there, or the whole has another hash.
            OSError: If it cannot be written.
        """
        have, size = self.have(piece.file), data.stat().st_size
        if piece.offset + size <= have:
            return have
        if piece.offset != have or have + size > piece.total:
            raise ClientError(f"a part begins at byte {piece.offset}, and {have} bytes are there; go on from there")
        if file_sha256(data) != piece.part:
            raise ClientError("a part was damaged on its way; send it again")
        growing = self._growing(piece.file)
        with open(growing, "r+b" if have else "wb") as file, open(data, "rb") as source:
            file.seek(have)
            for chunk in iter(lambda: source.read(_AT_ONCE), b""):
                file.write(chunk)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        have += size
        if have == piece.total:  # noted only once it is whole: a kill until then costs the last part
            self._finish(piece.file)
        else:
            write_json(self._note(piece.file), {"have": have})
        return have

    def drop(self, file: str) -> None:
        """Forget a file, whole or not."""
        for path in (self.folder / file, self._growing(file), self._note(file)):
            path.unlink(missing_ok=True)

    def sweep(self, keep: set[str]) -> None:
        """Forget all files but these."""
        for path in list(self.folder.iterdir()):
            if path.name.partition(".")[0] not in keep:
                path.unlink(missing_ok=True)

    def _finish(self, file: str) -> None:
        growing = self._growing(file)
        with open(growing, "rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
        if found != file:
            self.drop(file)
            raise ClientError("a file arrived whole and has another hash than announced; send it again from the start")
        growing.rename(self.folder / file)
        self._note(file).unlink(missing_ok=True)

    def _growing(self, file: str) -> Path:
        return self.folder / f"{file}.part"

    def _note(self, file: str) -> Path:
        return self.folder / f"{file}.json"
