"""What a parity run found, and the verdict on it. The numbers are explained in docs/guide/verify.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_export.parity.error_stats import ErrorStats, FeatureError
from dflash_export.parity.limits import Limits, Verdict
from dflash_export.parity.measure import Run

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Difference",
    "Drafting",
    "PromptReport",
    "ReferenceDrafting",
    "RunReport",
    "Token",
    "VerifyReport",
    "worst",
]

FORMAT = "dflash-verify-report"
FORMAT_VERSION = 1

_RANK: Mapping[Verdict, int] = {"equal": 0, "near tie": 1, "bug": 2}


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest of ``verdicts``; ``"equal"`` for none."""
    return max(verdicts, key=_RANK.__getitem__, default="equal")


@dataclass(frozen=True)
class Token:
    """A token as people read it. ``logit`` is PyTorch's, in fp32, where it is known."""

    id: int
    text: str
    logit: float | None = None


@dataclass(frozen=True)
class Difference:
    """Where two runs diverge for the first time. Later tokens have other tokens before them and say nothing.

    Attributes:
        between: the two runs.
        token: 0-based index among the new tokens.
        position: the same, counted from the start of the prompt.
        tokens: what each run has there; None where it had ended.
        top_two: PyTorch's best and second best.
        margin: PyTorch's best minus second best logit.
        logit_gap: PyTorch's best logit minus that of the worse of the two tokens; what the verdict is about.
    """

    between: tuple[str, str]
    token: int
    position: int
    tokens: tuple[Token | None, Token | None]
    top_two: tuple[Token, Token]
    margin: float
    logit_gap: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class RunReport(Run):
    """One run, every token accounted for, also after a difference.

    Attributes:
        equal_to_pytorch: leading tokens that are those of PyTorch's run.
        near_ties: tokens that aren't the best of PyTorch's or of our own logits, within the bounds.
        faults: indices of tokens beyond a bound.
        worst_logit_gap: largest distance of a token's logit below PyTorch's best.
        worst_own_logit_gap: the same in the bundle's own logits, one row at a time; None for PyTorch's run.
    """

    equal_to_pytorch: int
    near_ties: int
    faults: tuple[int, ...]
    worst_logit_gap: float
    worst_own_logit_gap: float | None
    verdict: Verdict


@dataclass(frozen=True)
class PromptReport:
    """One prompt. ``smallest_margin`` and ``close_calls`` are about PyTorch's own choice along the plain run.

    ``close_calls`` counts tokens whose margin is within the bound: only these may differ without a bug.
    """

    index: int
    text: str
    prompt_token_ids: tuple[int, ...]
    runs: tuple[RunReport, ...]
    differences: tuple[Difference, ...]
    smallest_margin: float
    close_calls: int
    verdict: Verdict


@dataclass(frozen=True)
class Drafting:
    """What drafting gained at one width, over all prompts.

    ``tokens_per_step`` counts the bonus; ``accepted_by_position`` is the share of steps in which the draft at
    each position was accepted.
    """

    width: int
    steps: int
    tokens_per_step: float
    accepted_by_position: tuple[float, ...]


@dataclass(frozen=True)
class ReferenceDrafting:
    """The reference's loop in fp32 beside ours at the same width; or why it didn't run.

    ``compared`` steps began at the same token in both; in ``same`` of them both gained as many tokens.
    """

    skipped: str | None
    version: str | None = None
    width: int | None = None
    tokens_per_step: float | None = None
    our_tokens_per_step: float | None = None
    compared: int | None = None
    same: int | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """A whole parity run. ``table.render`` is for people, :meth:`to_dict` for programs.

    Attributes:
        bundle: name, precision, type of quantised weights (or None) and SHA-256 of the manifest, which pins
            every file of the bundle.
        target: id, revision and kind of the checkpoint, whose files are those that the bundle records.
        max_new_tokens: tokens asked for at most.
        created: UTC time.
        environment: package versions, processor, threads.
        prompts: one entry per prompt.
        logit_errors: our logits against PyTorch's, by rows of a pass.
        shape_errors: our logits in passes of several rows against one row at a time.
        pytorch_repeated: PyTorch's ``generate`` against its one pass: its own noise.
        pytorch_16_bit: PyTorch in the bundle's precision against fp32; None for an fp32 bundle.
        limits: the bounds that follow from these.
        features: error of the tapped layers.
        drafting: by width.
        reference: the reference's loop.
        problems: why the verdict is "bug".
        warnings: what costs speed but can't change a token.
    """

    bundle: Mapping[str, str | None]
    target: Mapping[str, str | None]
    max_new_tokens: int
    created: str
    environment: Mapping[str, str | int | None]
    prompts: tuple[PromptReport, ...]
    logit_errors: Mapping[int, ErrorStats]
    shape_errors: Mapping[int, ErrorStats]
    pytorch_repeated: ErrorStats
    pytorch_16_bit: ErrorStats | None
    limits: Limits
    features: tuple[FeatureError, ...]
    drafting: tuple[Drafting, ...]
    reference: ReferenceDrafting
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """``"equal"``: every token is PyTorch's; ``"near tie"``: or excused by one; ``"bug"``: neither."""
        return "bug" if self.problems else worst([prompt.verdict for prompt in self.prompts])

    @property
    def ok(self) -> bool:
        """Whether there is no bug."""
        return self.verdict != "bug"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "ok": self.ok, "verdict": self.verdict}
        body: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return head | body
