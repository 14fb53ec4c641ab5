"""Identities: 128-bit hashes in hex, equal on every machine and in every run."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.fingerprint import canonical_json, hash128


def sample_id(corpus: str, path: str, row: int, window: int) -> str:
    """Unique id of a sample: hash of (corpus name, path relative to the corpus root, row, window)."""
    return hash128(b"sample", canonical_json([corpus, path, row, window]))


def content_id(text: str, loss_spans: Sequence[tuple[int, int]]) -> str:
    """Hash of text and loss spans (character offsets into the text); equal for exact duplicates."""
    return hash128(
        b"content", text.encode("utf-8", "surrogatepass"), canonical_json([list(span) for span in loss_spans])
    )


def unit_id(
    path: str, byte_start: int, byte_end: int, row_start: int, row_count: int, source: str, columns: str
) -> str:
    """Id of a work unit: hash of its place, the fingerprint of its bytes, and that of the columns read from it."""
    return hash128(b"unit", canonical_json([path, byte_start, byte_end, row_start, row_count, source, columns]))
