"""Who owns which rows: the family of partitions, and the files that say and hold it."""

from fedproxy.data.partition.base import (
    Clients,
    Partition,
    check_same_owners,
    heterogeneity,
    save_partition,
)
from fedproxy.registry import import_members

import_members(__name__, __path__)

__all__ = ["Clients", "Partition", "check_same_owners", "heterogeneity", "save_partition"]
