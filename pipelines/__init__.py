"""Corpus readers and Beam pipelines: plan, target, score, select, export."""

import logging


def _about_this_pipeline(record: logging.LogRecord) -> bool:
    """Beam warns at import, in every process, that clients of BigQuery are absent; nothing here uses them."""
    return not str(record.msg).startswith("apitools not found")


logging.getLogger().addFilter(_about_this_pipeline)
