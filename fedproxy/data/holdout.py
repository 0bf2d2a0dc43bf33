"""Rows that nobody trains on (``data.holdout``): which ones, and that none of them is taught all the same."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.seeding import derive_seed


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[str]]:
    """Mark a share or a number of each source's (or named client's) rows as held out, and say in words how many.

    The draw depends on the seed and the rows' keys alone, so that whoever owns the rows, the same are held out. One
    whose prompt a training row has as well (a conversation: up to any of the answers that it is trained on), or the
    text where there is no prompt, is dropped.

    Raises:
        DataError: If no row would be held out, or none of them is left.
    """
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.source, row.owner), []).append(row)
    chosen: set[str] = set()
    for own in groups.values():
        count = round(share * len(own)) if share < 1 else int(share)
        ranked = sorted(own, key=lambda row: derive_seed(seed, "holdout", row.key))
        chosen.update(row.key for row in ranked[:count])
    if not chosen:
        raise DataError(
            f"data.holdout={share}: that share of the largest of {len(groups)} groups of rows, "
            f"{max(map(len, groups.values()))} rows, is less than half a row; hold out more, or give more rows"
        )
    trained = {asked for row in rows if row.key not in chosen for asked in _taught(row)}
    fresh = [row for row in rows if row.key not in chosen or _asked(row) not in trained]
    kept = [replace(row, held_out=True) if row.key in chosen else row for row in fresh]
    dropped = len(rows) - len(kept)
    if dropped == len(chosen):
        raise DataError(
            f"data.holdout={share}: none of {dropped} held-out rows is left, as training rows have the same prompts; "
            "hold out more, or remove repeated rows"
        )
    notes = [f"{len(chosen) - dropped} of {len(kept)} rows are held out: nobody trains on them."]
    if dropped:
        notes.append(f"{dropped} further held-out rows were dropped: training rows have the same prompts.")
    return kept, notes


def _asked(row: Row) -> str:
    return " ".join((row.prompt or row.target).split())


def _taught(row: Row) -> Iterator[str]:
    """Yield what a row teaches an answer to, as :func:`_asked` has it: of a conversation all up to each answer."""
    if not (row.messages and row.loss == "all"):
        yield _asked(row)
        return
    said: list[str] = []
    for message in row.messages:
        if message["role"] == "assistant":
            yield " ".join(said)
        said += str(message["content"]).split()
