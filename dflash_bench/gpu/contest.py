"""All contenders of one row in turn, repeat by repeat, so that what disturbs one disturbs all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from dflash_bench.gpu.budget import Budget, SkippedError
from dflash_bench.gpu.rows import Sample

__all__ = ["Contender", "run_contest"]

Contender: TypeAlias = Callable[[], Sample]


def run_contest(
    contenders: Mapping[str, Contender],
    *,
    repeats: int,
    budget: Budget,
    optional: Collection[str] = (),
    missing: dict[str, str] | None = None,
) -> dict[str, list[Sample]]:
    """Run each once as a warm-up that doesn't count, then ``repeats`` times, each time another one first.

    One of ``optional`` that fails is left out from then on, and ``missing`` is told why. Stops early, after
    whole repeats, when the next one may not fit into the budget: judged by the slowest so far. Raises
    :class:`SkippedError` if there was no time for even one.
    """
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    longest = 0.0
    for repeat in range(-1, repeats):
        if longest > budget.left:
            break
        left = budget.left
        for place in range(len(names)):
            name = names[(place + max(repeat, 0)) % len(names)]
            if name not in samples:
                continue
            try:
                sample = contenders[name]()
            except Exception as error:
                if name not in optional or missing is None:
                    raise
                missing[name] = f"{type(error).__name__}: {error}"
                del samples[name]
                continue
            if repeat >= 0:
                samples[name].append(sample)
        longest = max(longest, left - budget.left)
    if not any(samples.values()):
        raise SkippedError(f"no time: a repeat takes {longest:.0f} s, and {budget.left:.0f} s are left")
    return samples
