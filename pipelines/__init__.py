"""Corpus readers and Beam pipelines: plan, target, score, select, export."""

import logging

from schemas.errors import LehrError


def _about_this_pipeline(record: logging.LogRecord) -> bool:
    """Beam warns at import, in every process, that clients of BigQuery are absent; nothing here uses them."""
    return not str(record.msg).startswith("apitools not found")


def _unexplained(record: logging.LogRecord) -> bool:
    """Beam logs every exception of a step with its traceback; the message of a `LehrError` is enough, and is passed on."""
    return not (record.exc_info and isinstance(record.exc_info[1], LehrError))


logging.getLogger().addFilter(_about_this_pipeline)
logging.getLogger("apache_beam.runners.common").addFilter(_unexplained)
