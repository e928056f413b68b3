"""What drafting gained, in the bundle's loop and in the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from dflash_export.parity.limits import compare_steps
from dflash_export.parity.measure import Measurements, drafted_name
from dflash_export.parity.report import Drafting, ReferenceDrafting
from dflash_export.progress import Progress
from dflash_export.reference import generate_reference, load_drafter, reference_version
from dflash_export.sources.resolve import Source
from dflash_rt.bundle.manifest import Manifest

__all__ = ["drafting_at", "run_reference"]


def run_reference(
    model: Any,
    drafter: Source,
    manifest: Manifest,
    measurements: Sequence[Measurements],
    max_new_tokens: int,
    progress: Progress,
) -> ReferenceDrafting:
    """The reference's loop at the full block size, beside our run of that width."""
    width = manifest.drafter.block_size
    reference = load_drafter(drafter)
    same = compared = steps = tokens = our_steps = our_tokens = 0
    with progress.stage("running the reference's loop", total=len(measurements)) as stage:
        for item in measurements:
            ours = item.runs[drafted_name(width)]
            gained = [count + 1 for count in ours.accepted_per_step]
            # It clips blocks near the end, which changes the drafts in them; so its end is further off.
            run = generate_reference(
                reference,
                model,
                item.prompt.token_ids,
                max_new_tokens=max_new_tokens + width,
                stop_token_ids=manifest.generation.stop_token_ids,
            )
            found = run.token_ids[:max_new_tokens]
            steps_compared, steps_same = compare_steps(ours.token_ids, gained, found, run.tokens_by_step)
            compared, same = compared + steps_compared, same + steps_same
            steps += _steps_until(len(found), run.tokens_by_step)
            tokens += len(found) - 1
            our_steps, our_tokens = our_steps + len(gained), our_tokens + len(ours.token_ids) - 1
            stage.advance()
    return ReferenceDrafting(
        skipped=None,
        version=reference_version(),
        width=width,
        tokens_per_step=_ratio(tokens, steps),
        our_tokens_per_step=_ratio(our_tokens, our_steps),
        compared=compared,
        same=same,
    )


def _steps_until(tokens: int, gained: Sequence[int]) -> int:
    """How many steps it took to have ``tokens`` tokens, the first of which came from the prefill."""
    return sum(have < tokens for have in accumulate(gained[:-1], initial=1)) if gained else 0


def _ratio(tokens: int, steps: int) -> float:
    return tokens / steps if steps else 0.0


def drafting_at(measurements: Sequence[Measurements], width: int) -> Drafting:
    """What drafting at one width gained over all prompts."""
    runs = [item.runs[drafted_name(width)] for item in measurements]
    counts = [count for run in runs for count in run.accepted_per_step]
    return Drafting(
        width=width,
        steps=len(counts),
        tokens_per_step=_ratio(sum(len(run.token_ids) - 1 for run in runs), len(counts)),
        accepted_by_position=tuple(
            _ratio(sum(count > position for count in counts), len(counts)) for position in range(width - 1)
        ),
    )
