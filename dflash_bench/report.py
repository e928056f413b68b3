"""The common part of reports: the conditions of a run, and numbers of its systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dflash_bench.machine import load_average, package_versions
from dflash_bench.stats import Outcomes, Ratio, Summary, ratio, seconds_per_step, summarise, tokens_per_second
from dflash_bench.systems.own import PLAIN
from dflash_rt.bundle.folder import Bundle
from dflash_rt.errors import RequestError
from dflash_rt.files import utc_now
from dflash_rt.machine import cpu_name
from dflash_rt.request import check_count

__all__ = ["Conditions", "Report", "check_counts", "conditions_of"]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the numbers depend on besides the code.

    ``load_before`` and ``load_after`` are the machine's load averages over one minute, the run included.
    ``quantization`` says how the bundle's weights are stored, and ``baseline`` describes the second bundle.
    """

    bundle: str
    precision: str
    backend: str
    threads: int
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    repeats: int
    created: str
    cpu: str
    packages: Mapping[str, str]
    load_before: float | None = None
    load_after: float | None = None
    quantization: str | None = None
    baseline: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every system did.

    Attributes:
        conditions: what was run, where.
        outcomes: each system's outcomes; :data:`PLAIN` is among them.
        num_draft_tokens: tokens that a step drafts, of the systems of which it is known.
    """

    conditions: Conditions
    outcomes: Mapping[str, Outcomes]
    num_draft_tokens: Mapping[str, int]

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Totals by system, over all prompts."""
        return {name: summarise(outcomes) for name, outcomes in self.outcomes.items()}

    def speed_ratio(self, name: str, other: str) -> Ratio | None:
        """Tokens per second of one over another."""
        return ratio(self.outcomes[name], self.outcomes[other], tokens_per_second)

    def step_cost(self, name: str) -> Ratio | None:
        """Time of a step over that of a plain step, on the same prompts and so at the same contexts."""
        return ratio(self.outcomes[name], self.outcomes[PLAIN], seconds_per_step)


def check_counts(max_new_tokens: int, repeats: int) -> None:
    """Raise RequestError unless that much can be measured."""
    check_count("repeats", repeats)
    if check_count("max_new_tokens", max_new_tokens) < 2:
        raise RequestError(
            "max_new_tokens is too small to measure decoding",
            found=max_new_tokens,
            expected="at least 2: the first token is the prefill's",
            remedy="pass more",
        )


def conditions_of(
    bundle: Bundle,
    backend: str,
    threads: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int,
    load_before: float | None,
    baseline: Bundle | None = None,
) -> Conditions:
    """What a run that has just ended was run with."""
    return Conditions(
        bundle=bundle.manifest.name,
        precision=bundle.manifest.precision,
        quantization=_quantization(bundle),
        baseline=None if baseline is None else _described(baseline),
        backend=backend,
        threads=threads,
        prompt_tokens=tuple(map(len, prompts)),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        created=utc_now(),
        cpu=cpu_name(),
        packages=package_versions(),
        load_before=load_before,
        load_after=load_average(),
    )


def _quantization(bundle: Bundle) -> str | None:
    info = bundle.manifest.quantization
    if info is None:
        return None
    blocks = "" if info.block_size is None else f" in blocks of {info.block_size}"
    activations = "" if info.activations is None else f", activations {info.activations}"
    return f"{info.weights}{blocks}{activations}, head {info.head or bundle.manifest.precision}"


def _described(bundle: Bundle) -> str:
    parts = [bundle.manifest.precision, _quantization(bundle)]
    return f"{bundle.manifest.name} ({', '.join(part for part in parts if part)})"
