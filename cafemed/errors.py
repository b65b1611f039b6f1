"""The errors that are a user's to mend: each is one line, without a traceback, in every job.

A message names the file, column, key or field, says what was expected and what came, and what to
do. It never holds a patient's data (no identifier, no code of a record, no date of a visit).
"""


class UserError(Exception):
    """Base of the errors below; a job prints its message as one line and exits with status 2."""


class ConfigError(UserError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """An input table is missing, empty, or holds what the adapter cannot read."""


class ArtifactError(UserError):
    """An artifact is missing, truncated, edited, or does not belong to the others."""


class TrainingError(UserError):
    """A loss or a prediction is not a finite number, so that training cannot go on."""


class MissingProgramError(UserError):
    """An optional program or package (R with pcalg, RDKit) is not installed."""


class TrackingError(UserError):
    """A tracking server does not answer, or refuses what it was sent."""


class TrackingRefusedError(TrackingError):
    """A tracking server refuses what it was sent, and would again."""
