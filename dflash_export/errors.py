"""The exceptions that only an export raises.

::

    dflash_rt.errors.DFlashError
    └── ExportError                 an export can't be done
        ├── SourceError             a model can't be found or read
        │   └── CheckpointError     its files are truncated, malformed, pickled or incomplete
        ├── UnsupportedModelError   a model that would not be exported faithfully
        ├── PairError               target and drafter don't belong together (lists every problem)
        ├── EngineBuildError        an engine can't be built, or would be wrong
        ├── RecipeError             a recipe file or a build option is wrong
        └── VerifyError             a parity run can't be done
"""

from __future__ import annotations

from collections.abc import Sequence

from dflash_rt.errors import DFlashError, Problem

__all__ = [
    "CheckpointError",
    "EngineBuildError",
    "ExportError",
    "PairError",
    "RecipeError",
    "SourceError",
    "UnsupportedModelError",
    "VerifyError",
    "numbered",
    "pair_error",
]


class ExportError(DFlashError):
    """An export can't be done."""


class SourceError(ExportError):
    """A model can't be found or read."""


class CheckpointError(SourceError):
    """The files of a model are truncated, malformed, pickled or incomplete."""


class UnsupportedModelError(ExportError):
    """A model that would not be exported faithfully."""


class PairError(ExportError):
    """Target and drafter don't belong together. ``problems`` lists every reason."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(numbered(what, self.problems))


class EngineBuildError(ExportError):
    """An engine can't be built from a bundle, or would compute something else than its graph."""


class RecipeError(ExportError):
    """A recipe file or a build option is wrong."""


class VerifyError(ExportError):
    """A parity run can't be done."""


def numbered(what: str, problems: Sequence[Problem]) -> str:
    """The text of an error that lists problems."""
    return "\n".join([what, *(f"{number}. {problem}" for number, problem in enumerate(problems, 1))])


def pair_error(problems: Sequence[Problem], errors: Sequence[ExportError]) -> ExportError:
    """A ``PairError`` that lists all problems, or the one of ``errors`` that is the only problem."""
    if len(problems) == len(errors) == 1:
        return errors[0]
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return PairError(f"this target and drafter can't be exported together: {count}", problems)
