"""Many pictures into a folder of shards: shared out among workers, and gone on with after a kill."""

from __future__ import annotations

from fewstep.bulk.making import TURNS, sample_many
from fewstep.bulk.shards import Shards

__all__ = ["TURNS", "Shards", "sample_many"]
