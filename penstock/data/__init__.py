"""Readers of the formats people have, and the embedded default data."""

from penstock.data.base import Data, Source
from penstock.data.loader import Batches

__all__ = ["Batches", "Data", "Source"]
