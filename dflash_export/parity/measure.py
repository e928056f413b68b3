"""Everything that a parity run measures, prompt by prompt; no verdicts yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dflash_export.parity.error_stats import ErrorCollector, FeatureErrorCollector
from dflash_export.parity.limits import first_difference, logit_gaps
from dflash_export.parity.prompts import PromptInput
from dflash_export.parity.replay import Replay
from dflash_export.reference import TeacherForced, generate_greedy, teacher_forced
from dflash_rt import GenerationResult
from dflash_rt.bundle.manifest import Manifest

__all__ = [
    "PLAIN",
    "PYTORCH",
    "Divergence",
    "ErrorCollectors",
    "Measurements",
    "Run",
    "drafted_name",
    "measure",
]

Floats = npt.NDArray[np.float64]
TokenIds = tuple[int, ...]

PLAIN = "plain"
PYTORCH = "PyTorch"
# Memory for logits that `generate` shows on its way.
_RECORDED_VALUES = 2**27


def drafted_name(width: int) -> str:
    """The name of a drafted run in reports."""
    return f"width {width}"


@dataclass(frozen=True)
class Run:
    """One generation: ours at a draft width, ours in plain decoding (width 1), or PyTorch's (width 0)."""

    name: str
    width: int
    token_ids: TokenIds
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    accepted_per_step: TokenIds = ()

    @classmethod
    def of(cls, result: GenerationResult, width: int) -> Run:
        """A run of the bundle."""
        name = PLAIN if width == 1 else drafted_name(width)
        return cls(name, width, result.token_ids, result.finish_reason, result.stats.accepted_per_step)


@dataclass(frozen=True)
class Divergence:
    """Where two runs diverge, seen by PyTorch in fp32 with the tokens before it.

    ``token_ids`` has None for a run that had ended. ``top_two`` is PyTorch's best and second best token with
    their logits; ``logit_gaps`` says how far each run's token is below the best.
    """

    runs: tuple[str, str]
    index: int
    token_ids: tuple[int | None, int | None]
    top_two: tuple[tuple[int, float], tuple[int, float]]
    logit_gaps: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Measurements:
    """One prompt.

    Attributes:
        runs: by name; drafted runs from the widest to the narrowest, plain, PyTorch.
        logit_gaps: for each run, per token, how far PyTorch's logit of it is below PyTorch's best.
        own_logit_gaps: for each of our runs the same with the bundle's own logits, one row at a time.
        margins: PyTorch's best minus second best logit at each token of the plain run.
        diverged: first differences of the pairs of runs that differ.
    """

    prompt: PromptInput
    runs: Mapping[str, Run]
    logit_gaps: Mapping[str, Floats]
    own_logit_gaps: Mapping[str, Floats]
    margins: Floats
    diverged: tuple[Divergence, ...]


class ErrorCollectors:
    """Errors of a whole parity run."""

    def __init__(self, widths: Sequence[int], feature_layers: Sequence[int]) -> None:
        self.by_width = {width: ErrorCollector(f"the bundle, {width} rows a pass") for width in widths}
        self.shapes = {
            width: ErrorCollector(f"the bundle, {width} rows a pass") for width in widths if width > 1
        }
        self.repeated = ErrorCollector("PyTorch in fp32")
        self.sixteen_bit = ErrorCollector("PyTorch in 16 bits")
        self.features = FeatureErrorCollector(feature_layers)


def measure(
    prompt: PromptInput,
    ours: Sequence[Run],
    *,
    model: Any,
    sixteen_bit_model: Any | None,
    replays: Sequence[Replay],
    manifest: Manifest,
    max_new_tokens: int,
    collectors: ErrorCollectors,
) -> Measurements:
    """Run PyTorch and the replays for one prompt. Holds the logits of one sequence at a time, twice."""
    greedy = generate_greedy(
        model,
        prompt.token_ids,
        max_new_tokens=max_new_tokens,
        stop_token_ids=manifest.generation.stop_token_ids,
        record_rows=_RECORDED_VALUES // model.config.vocab_size,
    )
    runs = {run.name: run for run in (*ours, Run(PYTORCH, 0, greedy.token_ids))}
    sequences: dict[TokenIds, list[Run]] = {}
    for run in runs.values():
        sequences.setdefault(run.token_ids, []).append(run)
    pairs = _differing_pairs(runs)
    found: dict[str, Floats] = {}
    own: dict[str, Floats] = {}
    margins = np.zeros(0)
    rows: dict[tuple[TokenIds, int], npt.NDArray[Any]] = {}
    for token_ids, same in sequences.items():
        names = [run.name for run in same]
        forced = teacher_forced(model, prompt.token_ids, token_ids, manifest.drafter.feature_layers)
        found |= dict.fromkeys(names, logit_gaps(forced.logits, token_ids))
        # Rows where this sequence diverges from another while it goes on itself.
        rows |= {
            (token_ids, index): forced.logits[index].copy()
            for first, second, index in pairs
            if token_ids in (first.token_ids, second.token_ids) and index < len(token_ids)
        }
        if PYTORCH in names:
            collectors.repeated.add(greedy.logits, forced.logits[: greedy.logits.shape[0]])
        if PLAIN in names:
            second_best, best = np.partition(forced.logits, -2, axis=1)[:, -2:].astype(np.float64).T
            margins = best - second_best
            if sixteen_bit_model is not None:
                lower = teacher_forced(sixteen_bit_model, prompt.token_ids, token_ids)
                collectors.sixteen_bit.add(lower.logits, forced.logits)
        if names != [PYTORCH]:
            # All forms of the target count for the errors; tokens come from the first.
            own_logit_gaps, *_ = [_replay(each, prompt, token_ids, forced, collectors) for each in replays]
            own |= dict.fromkeys((name for name in names if name != PYTORCH), own_logit_gaps)
    diverged = tuple(_divergence(first, second, index, rows) for first, second, index in pairs)
    return Measurements(prompt, runs, found, own, margins, diverged)


def _replay(
    replay: Replay,
    prompt: PromptInput,
    token_ids: TokenIds,
    forced: TeacherForced,
    collectors: ErrorCollectors,
) -> Floats:
    """The bundle's graphs over one sequence in every pass shape; returns the logit gaps one row at a time."""
    one_row = np.zeros_like(forced.logits)
    for width in sorted(collectors.by_width):
        for item in replay.passes(prompt.token_ids, token_ids, width):
            at = slice(item.first_token, item.first_token + item.logits.shape[0])
            collectors.by_width[width].add(item.logits, forced.logits[at])
            if width == 1:
                one_row[at] = item.logits
            else:
                collectors.shapes[width].add(item.logits, one_row[at])
            if width == max(collectors.by_width):
                right = forced.features[item.first_row : item.first_row + item.features.shape[0]]
                collectors.features.add(item.features.reshape(right.shape), right)
    return logit_gaps(one_row, token_ids)


def _differing_pairs(runs: Mapping[str, Run]) -> list[tuple[Run, Run, int]]:
    """Pairs of runs that diverge, and where. Two drafted widths are compared through plain."""
    pairs = []
    for first, second in combinations(runs.values(), 2):
        index = first_difference(first.token_ids, second.token_ids)
        if index is not None and second.width < 2:
            pairs.append((first, second, index))
    return pairs


def _divergence(
    first: Run, second: Run, index: int, rows: Mapping[tuple[TokenIds, int], npt.NDArray[Any]]
) -> Divergence:
    # Both have the same tokens before `index`; the one that goes on has logits there.
    longer = first if index < len(first.token_ids) else second
    logits = rows[longer.token_ids, index]
    best, second_best = np.argsort(-logits, kind="stable")[:2].tolist()
    tokens = [run.token_ids[index] if index < len(run.token_ids) else None for run in (first, second)]
    below = [0.0 if token is None else float(logits[best] - logits[token]) for token in tokens]
    return Divergence(
        runs=(first.name, second.name),
        index=index,
        token_ids=(tokens[0], tokens[1]),
        top_two=((best, float(logits[best])), (second_best, float(logits[second_best]))),
        logit_gaps=(below[0], below[1]),
    )
