"""What can be fetched: the entries of ``fedproxy/catalog/assets.yaml``, typed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedproxy.errors import AssetError, nearest

_CATALOG = Path(__file__).parents[2] / "catalog" / "assets.yaml"


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, pinned by its SHA-256."""

    name: str
    """Project name on the index."""
    version: str
    file: str
    """File name on the index."""
    sha256: str
    bytes: int
    """Size of the file."""
    licence: str


@dataclass(frozen=True)
class Asset:
    """One model or data set that ``asset:NAME`` stands for."""

    name: str
    kind: str
    """``model`` (from_pretrained folder), ``tasks`` (folder of <task>/<split>.jsonl) or ``text`` (one jsonl file)."""
    about: str
    licence: str
    conversion: str
    """Name of the function that writes the asset, see :mod:`fedproxy.data.assets.store`."""
    revision: int
    """Goes up when the conversion's output changes; an older cached copy is then made anew."""
    wheels: tuple[Wheel, ...] = ()
    """Where the raw material comes from; none for generated assets."""
    terms: str | None = None
    """Address of terms that whoever fetches the asset must accept; null where the licence asks for no such step."""
    file: str | None = None
    """The one file inside the asset's folder that users want, or None for the folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the conversion."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the cached copy depends on; another identity means another copy."""
        hashes = [wheel.sha256 for wheel in self.wheels]
        return {
            "asset": self.name,
            "sha256": hashes if len(hashes) > 1 else hashes[0] if hashes else None,
            "conversion": self.conversion,
            "revision": self.revision,
            "options": dict(self.options),
        }


@cache
def catalog() -> Mapping[str, Asset]:
    """Return every known asset by name, in the catalog's order."""
    import yaml

    raw = yaml.safe_load(_CATALOG.read_text(encoding="utf-8"))
    wheels = {name: Wheel(name=name, **entry) for name, entry in raw["wheels"].items()}
    assets = {}
    for name, entry in raw["assets"].items():
        made_of = tuple(wheels[wheel] for wheel in entry.pop("wheels", ()))
        assets[name] = Asset(name=name, wheels=made_of, **entry)
    return MappingProxyType(assets)


def by_name(name: str) -> Asset:
    """Return one asset.

    Raises:
        AssetError: If the catalog has no such asset; the message names the nearest one.
    """
    try:
        return catalog()[name]
    except KeyError:
        raise AssetError(f"unknown asset {name!r}{nearest(name, catalog())}") from None
