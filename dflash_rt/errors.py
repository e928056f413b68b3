"""The exceptions of ``dflash_rt``. ``dflash_export.errors`` has those of an export, with the same base.

::

    DFlashError
    ├── BundleError                 a bundle folder can't be used
    │   ├── ManifestError           manifest.json is missing, malformed or hostile
    │   └── IntegrityError          a file is missing, truncated or changed
    ├── BackendError                a backend can't be loaded or failed while running
    │   ├── BackendUnavailableError the vendor library or the device is missing
    │   ├── DeviceError             a call of the device's library failed
    │   ├── EngineError             no built engine fits this machine, or its record can't be read
    │   └── NumericalError          a step gave logits that are not finite
    ├── RequestError                a request is refused before any work (also a ValueError)
    │   ├── PromptError             empty prompt, ids outside the vocabulary, text without a tokenizer
    │   ├── ContextLengthError      prompt + output don't fit the bundle's limit
    │   ├── SamplingError           sampling parameters that are wrong or not supported
    │   └── ChatTemplateError       no chat template, or it failed to render
    ├── OutputError                 a file or folder exists, or can't be written
    └── GeneratorStateError         used after close, or from inside its own open stream
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "ChatTemplateError",
    "ContextLengthError",
    "DFlashError",
    "DeviceError",
    "EngineError",
    "GeneratorStateError",
    "IntegrityError",
    "ManifestError",
    "NumericalError",
    "OutputError",
    "Problem",
    "PromptError",
    "RequestError",
    "SamplingError",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what failed, what was found, what was expected, what to do."""

    what: str
    found: str | None = None
    expected: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        labelled = (("found", self.found), ("expected", self.expected), ("what to do", self.remedy))
        lines = [f"  {label}: {text}" for label, text in labelled if text is not None]
        return "\n".join([self.what, *lines])


class DFlashError(Exception):
    """Base of every error that this project raises on purpose.

    Its text has up to four lines: what failed, what was found, what was expected, what to do.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = Problem(
            what,
            None if found is None else str(found),
            None if expected is None else str(expected),
            remedy,
        )
        super().__init__(str(self.problem))


class BundleError(DFlashError):
    """A bundle folder can't be used."""


class ManifestError(BundleError):
    """manifest.json is missing, malformed, of another version, or hostile."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, truncated, or differs from its record in the manifest."""


class BackendError(DFlashError):
    """A backend can't be loaded, or failed while running."""


class BackendUnavailableError(BackendError):
    """The vendor library or the device that a backend needs is missing."""


class DeviceError(BackendError):
    """A call of the library that drives a device failed; the running request is lost."""


class EngineError(BackendError):
    """No built engine of a bundle fits this machine, or the record of built engines can't be read."""


class NumericalError(BackendError):
    """A step gave logits that are not finite; no token of that step was emitted."""


class RequestError(DFlashError, ValueError):
    """A request is refused before any work was done."""


class PromptError(RequestError):
    """An empty prompt, ids outside the vocabulary, or text for a bundle without a tokenizer."""


class ContextLengthError(RequestError):
    """Prompt and output together don't fit the bundle's limit."""


class SamplingError(RequestError):
    """Sampling parameters that are wrong or not supported."""


class ChatTemplateError(RequestError):
    """The bundle has no chat template, or the template failed to render."""


class GeneratorStateError(DFlashError, RuntimeError):
    """A generator was used after close, or from inside its own open stream."""


class OutputError(DFlashError):
    """An output file or folder exists already, or can't be written."""
