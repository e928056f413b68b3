"""Tokens against PyTorch's on the same device; every difference is a near tie or a bug, as in ``verify``.

The bound of a near tie is PyTorch's own noise alone: twice the largest difference between its logits in fp32,
computed in two ways, or for a 16-bit bundle between its logits in that precision and in fp32. The backend's
own error doesn't enter, so it can't excuse itself.
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["classify_gaps", "run_parity"]

Tokens = tuple[int, ...]


def classify_gaps(gaps: Sequence[float], bound: float) -> tuple[int, int, int]:
    """How many tokens are equal, near ties and bugs, by how far each is below PyTorch's best in fp32."""
    verdicts = [classify(value, bound, same=value == 0) for value in gaps]
    return verdicts.count("equal"), verdicts.count("near tie"), verdicts.count("bug")


def run_parity(
    made: Made,
    backend: BackendSpec,
    device: str,
    *,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Decode each prompt drafted and plainly, and by PyTorch in fp32 and in the bundle's precision.

    The reference's loop runs too, in fp32, if it is installed: its accepted counts are compared step by step.

    Returns:
        For each kind of run, counts over all prompts: ``tokens`` compared; those that are ``equal`` to
        PyTorch's best in fp32, given the tokens before them; the others, sorted by ``bound`` into
        ``near_ties`` and ``bugs``; ``worst``, the largest logit gap; ``answers``, and the ``equal_answers``
        among them, with exactly the tokens that PyTorch decoded in the bundle's precision.
    """
    manifest = made.bundle.manifest
    dtype = DTYPES[manifest.precision]
    exact = load_target(resolve_target(made.target)).to(device)
    coarse = (
        load_target(resolve_target(made.target), dtype).to(device) if manifest.precision != "fp32" else exact
    )
    repeated, noise = ErrorCollector("PyTorch in fp32"), ErrorCollector(f"PyTorch in {manifest.precision}")
    names = ("drafted", "plain", "PyTorch")
    answers: dict[str, list[Tokens]] = {name: [] for name in names}
    gaps: dict[str, list[float]] = {name: [] for name in names}
    steps: list[Tokens] = []
    with Generator(
        made.bundle, backend.open(made.bundle), num_draft_tokens=manifest.drafter.block_size - 1
    ) as generator:
        for prompt in prompts:
            for name in ("drafted", "plain"):
                result = generator.generate(
                    list(prompt),
                    max_new_tokens=max_new_tokens,
                    sampling=SamplingParams(),
                    stop_token_ids=[],
                    speculative=name == "drafted",
                )
                answers[name].append(result.token_ids)
                if name == "drafted":
                    steps.append(result.stats.accepted_per_step)
            greedy = generate_greedy(
                coarse,
                prompt,
                max_new_tokens=max_new_tokens,
                stop_token_ids=(),
                record_rows=max_new_tokens,
            )
            answers["PyTorch"].append(greedy.token_ids)
            for name in names:
                tokens = answers[name][-1]
                forced = teacher_forced(exact, prompt, tokens)
                gaps[name] += logit_gaps(forced.logits, tokens).tolist()
                if coarse is not exact:
                    noise.add(teacher_forced(coarse, prompt, tokens).logits, forced.logits)
                elif name == "PyTorch":
                    repeated.add(greedy.logits, forced.logits[: greedy.logits.shape[0]])
    bound = 2 * max(repeated.result().max_abs, noise.result().max_abs)
    results = []
    for name, found in answers.items():
        equal, near_ties, bugs = classify_gaps(gaps[name], bound)
        count = sum(map(len, found))
        results.append(
            {
                "pair": manifest.name,
                "precision": manifest.precision,
                "backend": str(backend),
                "run": name,
                "tokens": count,
                "equal": equal,
                "near_ties": near_ties,
                "bugs": bugs,
                "answers": len(found),
                "equal_answers": sum(a == b for a, b in zip(found, answers["PyTorch"], strict=True)),
                "worst": max(gaps[name]),
                "bound": bound,
                "tokens_per_step": None,
                "steps_as_reference": None,
                "verdict": "bug" if bugs else "near tie" if near_ties else "equal",
            }
        )
        if name == "drafted":
            taken = sum(map(len, steps))
            results[-1]["tokens_per_step"] = (count - len(found)) / taken if taken else None
            results[-1]["steps_as_reference"] = _reference(made, exact, device, prompts, found, steps)
    return results


def _reference(
    made: Made,
    target: Any,
    device: str,
    prompts: Sequence[Sequence[int]],
    drafted: Sequence[Tokens],
    steps: Sequence[Tokens],
) -> str | None:
    """``"same of compared"`` steps that gained as many tokens as the reference's, in fp32."""
    if reference_version() is None or made.bundle.manifest.precision != "fp32":
        return None
    drafter = load_drafter(resolve_drafter(made.drafter)).to(device)
    same = compared = 0
    for prompt, tokens, accepted in zip(prompts, drafted, steps, strict=True):
        # It clips blocks near the end, which changes the drafts in them; so its end is further off.
        longer = len(tokens) + made.bundle.manifest.drafter.block_size
        reference = generate_reference(drafter, target, prompt, max_new_tokens=longer, stop_token_ids=())
        gained = [count + 1 for count in accepted]
        steps_compared, steps_same = compare_steps(
            tokens, gained, reference.token_ids[: len(tokens)], reference.tokens_by_step
        )
        same, compared = same + steps_same, compared + steps_compared
    return f"{same} of {compared}"
