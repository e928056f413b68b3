"""Tokens against PyTorch's on the same device; every difference is a near tie or a bug, as in ``verify``.

The bound of a near tie is PyTorch's own noise alone: twice the largest difference between its logits in fp32,
computed in two ways, or for a 16-bit bundle between its logits in that precision and in fp32. The backend's
own error doesn't enter, so it can't excuse itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dflash_bench.gpu.backend_spec import BackendSpec
from dflash_bench.gpu.bundles import DTYPES, Made
from dflash_export.parity.error_stats import ErrorCollector
from dflash_export.parity.limits import classify, compare_steps, logit_gaps
from dflash_export.reference import (
    generate_greedy,
    generate_reference,
    load_drafter,
    load_target,
    reference_version,
    teacher_forced,
)
from dflash_export.sources.resolve import resolve_drafter, resolve_target
from dflash_rt import Generator, SamplingParams

__all__ = ["ParityResult", "Run", "classify_run", "run_parity"]


@dataclass(frozen=True)
class Run:
    """One decoding of one prompt; its logit gaps are how far each token is below PyTorch's best in fp32."""

    name: str
    token_ids: tuple[int, ...]
    logit_gaps: tuple[float, ...]


@dataclass(frozen=True)
class ParityResult:
    """Counts over all prompts of one kind of run.

    Attributes:
        tokens: compared.
        equal: those that are PyTorch's best in fp32, given the tokens before them.
        near_ties, bugs: the others, sorted by ``bound``.
        answers, equal_answers: prompts, and those with exactly the tokens that PyTorch decoded in the
            bundle's precision.
        worst: the largest logit gap.
    """

    pair: str
    precision: str
    backend: str
    run: str
    tokens: int
    equal: int
    near_ties: int
    bugs: int
    answers: int
    equal_answers: int
    worst: float
    bound: float
    tokens_per_step: float | None
    steps_as_reference: str | None

    @property
    def verdict(self) -> str:
        """The worst that was found."""
        return "bug" if self.bugs else "near tie" if self.near_ties else "equal"

    def as_dict(self) -> dict[str, Any]:
        """Fields and verdict as JSON values."""
        return {**asdict(self), "verdict": self.verdict}


def classify_run(run: Run, bound: float) -> tuple[int, int, int]:
    """How many tokens are equal, near ties and bugs."""
    verdicts = [classify(value, bound, same=value == 0) for value in run.logit_gaps]
    return verdicts.count("equal"), verdicts.count("near tie"), verdicts.count("bug")


def run_parity(
    made: Made,
    backend: BackendSpec,
    device: str,
    *,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[ParityResult]:
    """Decode each prompt drafted and plainly, and by PyTorch in fp32 and in the bundle's precision.

    The reference's loop runs too, in fp32, if it is installed: its accepted counts are compared step by step.
    """
    manifest = made.bundle.manifest
    dtype = DTYPES[manifest.precision]
    exact = load_target(resolve_target(made.target)).to(device)
    coarse = (
        load_target(resolve_target(made.target), dtype).to(device) if manifest.precision != "fp32" else exact
    )
    repeated, noise = ErrorCollector("PyTorch in fp32"), ErrorCollector(f"PyTorch in {manifest.precision}")
    names = ("drafted", "plain", "PyTorch")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    steps: list[tuple[int, ...]] = []
    with Generator(
        made.bundle, backend.open(made.bundle), num_draft_tokens=manifest.drafter.block_size - 1
    ) as generator:
        for prompt in prompts:
            tokens = {}
            for name in ("drafted", "plain"):
                result = generator.generate(
                    list(prompt),
                    max_new_tokens=max_new_tokens,
                    sampling=SamplingParams(),
                    stop_token_ids=[],
                    speculative=name == "drafted",
                )
                tokens[name] = tuple(result.token_ids)
                if name == "drafted":
                    steps.append(result.stats.accepted_per_step)
            greedy = generate_greedy(
                coarse,
                prompt,
                max_new_tokens=max_new_tokens,
                stop_token_ids=(),
                record_rows=max_new_tokens,
            )
            tokens["PyTorch"] = greedy.token_ids
            for name in names:
                forced = teacher_forced(exact, prompt, tokens[name])
                found = logit_gaps(forced.logits, tokens[name])
                runs[name].append(Run(name, tokens[name], tuple(found.tolist())))
                if coarse is not exact:
                    noise.add(teacher_forced(coarse, prompt, tokens[name]).logits, forced.logits)
                elif name == "PyTorch":
                    repeated.add(greedy.logits, forced.logits[: greedy.logits.shape[0]])
    bound = 2 * max(repeated.result().max_abs, noise.result().max_abs)
    agreed = _reference(made, exact, device, prompts, max_new_tokens, runs["drafted"], steps)
    results = []
    for name, same_kind in runs.items():
        judged = [classify_run(run, bound) for run in same_kind]
        pairs = zip(same_kind, runs["PyTorch"], strict=True)
        taken = sum(map(len, steps)) if name == "drafted" else 0
        results.append(
            ParityResult(
                pair=manifest.name,
                precision=manifest.precision,
                backend=str(backend),
                run=name,
                tokens=sum(len(run.token_ids) for run in same_kind),
                equal=sum(counts[0] for counts in judged),
                near_ties=sum(counts[1] for counts in judged),
                bugs=sum(counts[2] for counts in judged),
                answers=len(same_kind),
                equal_answers=sum(run.token_ids == other.token_ids for run, other in pairs),
                worst=max(max(run.logit_gaps) for run in same_kind),
                bound=bound,
                tokens_per_step=sum(len(run.token_ids) - 1 for run in same_kind) / taken if taken else None,
                steps_as_reference=agreed if name == "drafted" else None,
            )
        )
    return results


def _reference(
    made: Made,
    target: Any,
    device: str,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafted: Sequence[Run],
    steps: Sequence[Sequence[int]],
) -> str | None:
    """``"same of compared"`` steps that gained as many tokens as the reference's, in fp32."""
    if reference_version() is None or made.bundle.manifest.precision != "fp32":
        return None
    drafter = load_drafter(resolve_drafter(made.drafter)).to(device)
    # It clips blocks near the end, which changes the drafts in them; so its end is further off.
    longer = max_new_tokens + made.bundle.manifest.drafter.block_size
    same = compared = 0
    for prompt, run, accepted in zip(prompts, drafted, steps, strict=True):
        reference = generate_reference(drafter, target, prompt, max_new_tokens=longer, stop_token_ids=())
        gained = [count + 1 for count in accepted]
        found = compare_steps(
            run.token_ids, gained, reference.token_ids[:max_new_tokens], reference.tokens_by_step
        )
        same, compared = same + found.same, compared + found.compared
    return f"{same} of {compared}"
