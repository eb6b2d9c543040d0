"""The one exception the model preparation raises for things a user can fix."""


class ModelPreparationError(RuntimeError):
    """A model folder could not be prepared; the message says what to do about it."""
