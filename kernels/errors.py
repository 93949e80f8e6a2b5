"""The error types that the kernels raise; `qprune` re-exports them and adds its own below the same base."""


class QPruneError(Exception):
    """Base of every error that qprune raises on purpose. The message is one line and says what to do."""


class InputError(QPruneError, ValueError):
    """A tensor or an argument has the wrong dtype, rank, shape or value."""


class BackendError(QPruneError, RuntimeError):
    """A backend was asked for by name and cannot run here."""
