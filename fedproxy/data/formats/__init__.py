"""Data formats: what a record of a file says, as a row. Subclass :class:`DataFormat` to add one."""

from fedproxy.data.formats.base import DataFormat
from fedproxy.registry import import_members

__all__ = ["DataFormat"]

import_members(__name__, __path__)
