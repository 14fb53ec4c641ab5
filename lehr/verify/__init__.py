"""`lehr verify`: every checksum, count and lineage of a run."""

from lehr.verify.findings import Check
from lehr.verify.walk import verify

__all__ = ["Check", "verify"]
