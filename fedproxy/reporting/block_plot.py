"""Block Influence per block as a PNG; the page has the same plot as SVG."""

import io
from pathlib import Path
from typing import Any

from fedproxy.files import write_bytes
from fedproxy.reporting.run_report import CompressionReport

_KEPT, _REMOVED = "#2a6f97", "#c0392b"


def write_influence_plot(found: CompressionReport, path: Path) -> Path:
    """Draw a bar per block of the target, the removed ones hatched, and write it whole or not at all.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    return write_bytes(path, influence_png(found))


def influence_png(found: CompressionReport) -> bytes:
    """Return the plot as PNG; no window system and none of pyplot's state is involved."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kept = set(found.kept)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    for is_kept, label in ((True, "kept"), (False, "removed")):
        blocks = [block for block in range(len(found.scores)) if (block in kept) is is_kept]
        style: dict[str, Any] = (
            {"color": _KEPT} if is_kept else {"color": "white", "edgecolor": _REMOVED, "hatch": "////"}
        )
        if blocks:
            axes.bar(blocks, [found.scores[block] or 0.0 for block in blocks], label=label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block of the target")
    axes.set_ylabel("Block Influence")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
