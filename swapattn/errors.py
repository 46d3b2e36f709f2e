"""Errors that a user can act on: one clear line each, with the exit code of the command line."""

from __future__ import annotations


class SwapattnError(Exception):
    """Anything that stops a command; its message is the one line that the user sees."""

    exit_code = 1


class UsageError(SwapattnError):
    """The request itself is wrong: an unknown alias, a folder that is no model, a bad option value."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe does not say something valid; the message names the path of the key."""


class SourceError(SwapattnError):
    """A model, dataset or package could not be had; the message names the ways out."""


class UnsupportedModelError(SwapattnError):
    """The model has no softmax attention that can be swapped, or computes it out of reach; `reason` says it shortly."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class CheckpointError(SwapattnError):
    """A checkpoint is incomplete, damaged or of another kind than needed."""


class TrainingError(SwapattnError):
    """A distillation stage cannot go on: non-finite loss, no memory, no data."""


class ThresholdError(SwapattnError):
    """Everything ran, but a figure missed the threshold that was asked for."""

    exit_code = 3
