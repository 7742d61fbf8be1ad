"""Errors at the borders of sleb: each message names the value, what is allowed and the remedy."""

from __future__ import annotations


class SlebError(Exception):
    """Base of every error that a user can cause and mend; the command line prints it without a traceback."""


class ModelError(SlebError):
    """A model that cannot be found, fetched, converted or loaded."""


class LayerMapError(SlebError):
    """A layer map that is malformed, or does not fit the model or the depth asked of it."""


class ConfigError(SlebError, ValueError):
    """An option or flag out of its range, or one that this machine cannot meet."""


class RequestError(SlebError, ValueError):
    """A request that cannot be served as written.

    `param` is the offending field's name, `code` the machine-readable code of the HTTP contract.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidOutputError(SlebError):
    """The model gave a request logits that are not numbers, so that its answer cannot go on."""

    code = "invalid_model_output"


class EngineDeadError(SlebError):
    """The engine stopped after an internal failure; only a restart helps."""
