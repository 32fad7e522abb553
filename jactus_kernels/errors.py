"""The one exception of the project."""


class JactusError(ValueError):
    """Raised for anything a user can put right; the message says which module, what was received, what to do."""
