"""Clients' rows as a site holds them: tokenised when a client first trains, and only the latest few clients'."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedproxy.data.partition.rows import read_client_rows
from fedproxy.data.tokenisation import Example, tokenise


class ClientExamples(Mapping[str, list[Example]]):
    """Clients' tokenised rows, made when a client first trains; those of the latest few clients stay in memory.

    Args:
        folder: Clients' rows, see :func:`fedproxy.data.partition.rows.rows_file`.
        tokenizer: The proxy's tokenizer.
        max_input_tokens: Most prompt tokens of an example.
        max_target_tokens: Most target tokens of an example.
        max_tokens: Most tokens of an example, the model's positions; None is no bound.
        long_rows: What becomes of longer rows, see :class:`fedproxy.data.examples.Lengths`.
        held_out: Hold the rows that a client does not train on instead, of which there may be none.
        keep: How many clients' examples stay in memory.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input_tokens: int,
        max_target_tokens: int,
        max_tokens: int | None = None,
        long_rows: str = "cut",
        held_out: bool = False,
        keep: int = 16,
    ) -> None:
        self.folder, self.keep, self.held_out = folder, keep, held_out
        self._tokenise = partial(
            tokenise,
            tokenizer=tokenizer,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            max_tokens=max_tokens,
            long_rows=long_rows,
        )
        self._latest: OrderedDict[str, list[Example]] = OrderedDict()

    def __getitem__(self, client_id: str) -> list[Example]:
        """Return a client's tokenised rows, a row as often as the client has it."""
        if client_id not in self._latest:
            rows = read_client_rows(self.folder, client_id, held_out=self.held_out)
            copies = {row.key: row.copies for row in rows}
            examples = self._tokenise(rows)
            self._latest[client_id] = [example for example in examples for _ in range(copies[example.key])]
            while len(self._latest) > self.keep:
                self._latest.popitem(last=False)
        self._latest.move_to_end(client_id)
        return self._latest[client_id]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the clients in memory."""
        return iter(self._latest)

    def __len__(self) -> int:
        """How many clients are in memory."""
        return len(self._latest)
