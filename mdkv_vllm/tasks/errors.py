"""The error of this package."""


class TaskError(ValueError):
    """Examples that cannot be made or read; the message says why and what is allowed."""
