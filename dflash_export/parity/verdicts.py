"""From measurements to verdicts: each token, each difference, each prompt, and the run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dflash_export.parity.error_stats import ErrorStats, FeatureError
from dflash_export.parity.limits import Limits, classify, equal_prefix
from dflash_export.parity.measure import PYTORCH, Divergence, Measurements, Run
from dflash_export.parity.report import (
    Difference,
    PromptReport,
    ReferenceDrafting,
    RunReport,
    Token,
    worst,
)

__all__ = ["classify_prompt", "find_problems", "find_warnings"]

_MAX_PROBLEMS = 20
# Features this far off (share of a row's norm) cost acceptance. Right graphs come out at 1e-6 (fp32) and
# 3e-3 (fp16), a tap of the wrong layer at about 1.
_FEATURE_ERROR = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 0.2}
# Drafts of an fp32 bundle are the reference's but for near ties; in 16 bits the gain is compared instead.
_STEP_AGREEMENT = 0.95
_GAIN = 0.9


def classify_prompt(
    index: int, measurements: Measurements, limits: Limits, text_of: Callable[[int], str]
) -> PromptReport:
    """The verdict on one prompt. ``text_of`` shows a token."""
    pytorch = measurements.runs[PYTORCH].token_ids
    runs = tuple(_classify_run(measurements, run, pytorch, limits) for run in measurements.runs.values())
    ours = [run.verdict for run in runs if run.name != PYTORCH]
    prompt_rows = len(measurements.prompt.token_ids)
    differences = tuple(
        _classify_difference(item, prompt_rows, limits, text_of) for item in measurements.diverged
    )
    return PromptReport(
        index=index,
        text=measurements.prompt.text,
        prompt_token_ids=measurements.prompt.token_ids,
        runs=runs,
        differences=differences,
        smallest_margin=float(measurements.margins.min()),
        close_calls=int((measurements.margins <= limits.near_tie).sum()),
        verdict=worst([*ours, *(item.verdict for item in differences)]),
    )


def _classify_run(measurements: Measurements, run: Run, pytorch: Sequence[int], limits: Limits) -> RunReport:
    below = measurements.logit_gaps[run.name]
    own = measurements.own_logit_gaps.get(run.name)
    verdicts = [classify(value, limits.near_tie, same=value == 0) for value in below]
    if own is not None:
        own_verdicts = [classify(value, limits.own_tie, same=value == 0) for value in own]
        verdicts = [worst(pair) for pair in zip(verdicts, own_verdicts, strict=True)]
    return RunReport(
        **vars(run),
        equal_to_pytorch=equal_prefix(run.token_ids, pytorch),
        near_ties=verdicts.count("near tie"),
        faults=tuple(i for i, verdict in enumerate(verdicts) if verdict == "bug"),
        worst_logit_gap=float(np.max(below, initial=0.0)),
        worst_own_logit_gap=None if own is None else float(np.max(own, initial=0.0)),
        verdict=worst(verdicts),
    )


def _classify_difference(
    item: Divergence, prompt_rows: int, limits: Limits, text_of: Callable[[int], str]
) -> Difference:
    logit_gap = max(item.logit_gaps)
    # With the same tokens before it, a run can't have ended while another goes on.
    ended = None in item.token_ids
    tokens = [None if token is None else Token(token, text_of(token)) for token in item.token_ids]
    top_two = [Token(token, text_of(token), logit) for token, logit in item.top_two]
    return Difference(
        between=item.runs,
        token=item.index,
        position=prompt_rows + item.index,
        tokens=(tokens[0], tokens[1]),
        top_two=(top_two[0], top_two[1]),
        margin=item.top_two[0][1] - item.top_two[1][1],
        logit_gap=logit_gap,
        verdict="bug" if ended else classify(logit_gap, limits.near_tie),
    )


def find_problems(
    prompts: Sequence[PromptReport], errors: Mapping[int, ErrorStats], limits: Limits
) -> tuple[str, ...]:
    """Every reason to call the bundle wrong, for people; the first of many."""
    found = [*_wrong_logits(errors, limits), *_wrong_tokens(prompts)]
    if len(found) > _MAX_PROBLEMS:
        found[_MAX_PROBLEMS:] = [f"and {len(found) - _MAX_PROBLEMS} more, in the JSON report"]
    return tuple(found)


def _wrong_logits(errors: Mapping[int, ErrorStats], limits: Limits) -> Iterator[str]:
    for width, stats in errors.items():
        if not limits.allow(stats):
            yield (
                f"logits of {width}-row passes are further from PyTorch's than rounding explains:"
                f" {stats.relative(stats.median_row):.1e} of the standard deviation in a median row (allowed"
                f" {limits.median_row:.1e}), {stats.relative(stats.worst_row):.1e} in the worst (allowed"
                f" {limits.worst_row:.1e}{' in 99 % of the rows' if limits.mixture else ''})"
            )


def _wrong_tokens(prompts: Sequence[PromptReport]) -> Iterator[str]:
    for prompt in prompts:
        for run in prompt.runs:
            if run.faults and run.name != PYTORCH:
                yield (
                    f"prompt {prompt.index}, {run.name}: {len(run.faults)} tokens are no near ties; the first"
                    f" is new token {run.faults[0]}"
                )
        for item in prompt.differences:
            if item.verdict == "bug":
                yield (
                    f"prompt {prompt.index}: {' and '.join(item.between)} diverge at new token {item.token},"
                    " which is no near tie"
                )


def find_warnings(
    features: Sequence[FeatureError], reference: ReferenceDrafting, precision: str
) -> Iterator[str]:
    """What costs speed and can't change a token: a drafter that isn't fed or run as it should be."""
    for item in features:
        if item.rms > _FEATURE_ERROR[precision]:
            yield (
                f"features of layer {item.layer} are off by {item.rms:.1e} of their norm"
                f" (right graphs: below {_FEATURE_ERROR[precision]:.0e}); fewer drafts will be accepted"
            )
    if reference.compared and reference.same is not None and precision == "fp32":
        if reference.same < _STEP_AGREEMENT * reference.compared:
            yield (
                f"the drafter doesn't draft as the reference does: as many drafts accepted in only"
                f" {reference.same} of {reference.compared} steps"
            )
    elif (reference.our_tokens_per_step or 0.0) < _GAIN * (reference.tokens_per_step or 0.0):
        yield (
            f"drafting gains {reference.our_tokens_per_step:.2f} tokens a step, the reference in fp32"
            f" {reference.tokens_per_step:.2f}"
        )
