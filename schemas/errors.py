"""Errors that a user can cause and can act on.

The `lehr` command prints the message of a `LehrError` alone, without a traceback; so a message names the thing, its
value and the way out.
"""


class LehrError(Exception):
    """Base of every error whose message is written for the user."""


class InputError(LehrError):
    """An option, a file or a model that the user named cannot be used as asked."""


class CorruptFile(LehrError):
    """A file of a run or a corpus is damaged: wrong hash, broken page, truncated."""


class SourceChanged(LehrError):
    """A corpus file differs from what the plan recorded."""


class MixedFingerprints(LehrError):
    """Artifacts that were made from different specs or inputs would have been read together."""


class RunIncomplete(LehrError):
    """A stage ended without everything its plan lists standing on storage; running it again resumes."""


class InfeasibleError(LehrError):
    """A selection problem has no solution under the limit given; the message holds the smallest feasible limit."""
