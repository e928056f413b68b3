"""The whole of decoding: prefill, then draft, verify, accept and commit until a stop condition holds.

Who owns which state:

- ``Sequence`` (sequence.py): tokens, committed rows, features not injected yet, counters. One per slot.
- ``WidthPolicy`` (policy.py): how many rows the next step has, and what was learned for that; it is told how
  long each step took, the caller's time left out.
- ``Sampler`` (sampler.py): random numbers, counts of emitted tokens, logprobs. A greedy request has none.
- ``Backend`` (backends/): caches and all other buffers. It knows neither tokens nor acceptance.
- ``TokenStream`` (stream.py): text, times, and the generator's lock while it runs.
- ``decode`` below: nothing that outlives a step.

Why one integer is a whole rollback. A step at ``start`` first injects ALL feature rows of the previous
verify pass at that pass's start, rejected rows too, and then writes its own block at ``start``::

    previous pass   a d d x x x          a: anchor  d: accepted  x: rejected
    this block            a m m m m m    overwrites every x before anything reads it

A narrower block leaves some x behind itself. They are masked there like all rows behind a block, and every
pass begins at or before the end of the one before it: a row is written again before it is ever committed.
The target's cache heals in the same way: later verify passes cover what the last one got wrong.

A plain step (one row) doesn't need the drafter's cache and injects nothing; the backend keeps the features,
and all of them are injected in one pass when a step drafts again, or before they would be overwritten.

A backend may keep anchor and ``start`` itself, and then take a greedy request's next step while this loop
reads the last one. Its number of rows is chosen a step early, and it is in vain if the last step ends the
request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Set
from dataclasses import dataclass
from typing import Literal

from dflash_rt.backends.base import Backend, Inject
from dflash_rt.decoding.policy import FixedWidth, WidthPolicy
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.sampling.greedy import accept_greedy
from dflash_rt.sampling.sampler import Sampler

__all__ = ["Decoded", "decode"]


@dataclass(frozen=True)
class Decoded:
    """Tokens that one step decided, cut at the first stop token and at the length limit.

    The first ``drafted`` of ``token_ids`` came from the drafter, the others from the target alone. There is
    always at least one token. ``finish_reason`` is set on the last item of a run, and only there.
    """

    token_ids: tuple[int, ...]
    drafted: int
    finish_reason: Literal["stop", "length"] | None


def decode(
    backend: Backend,
    sequence: Sequence,
    *,
    max_new_tokens: int,
    verify_len: int | WidthPolicy,
    prefill_chunk: int,
    stop_token_ids: Set[int] = frozenset(),
    sampler: Sampler | None = None,
    run_ahead: bool = True,
) -> Generator[Decoded, None, None]:
    """Decode; yield what the prefill decided (one token), then what each step decided.

    ``verify_len`` is the rows of a verify pass, the anchor and ``verify_len - 1`` drafts, or a policy that
    says so step by step; no token depends on it. 1 throughout is plain decoding, in which the drafter never
    runs and gets no features. ``max_new_tokens`` and ``prefill_chunk`` are at least 1. Without a ``sampler``
    tokens are the backend's own greedy choices. With ``run_ahead`` a backend that can do so begins a greedy
    request's next step before the last one is yielded.

    The caller may stop after any item: between steps every cache is whole. If the backend raises, its caches
    are cleared, the error passes on, and the backend can take another sequence.
    """
    policy = FixedWidth(verify_len) if isinstance(verify_len, int) else verify_len
    ahead = run_ahead and backend.runs_ahead and sampler is None
    launched: deque[int] = deque()  # rows of the steps that run, the oldest first
    try:
        # 1) Prefill. The last chunk's answer is the first token. Features are injected as they come.
        #    Room is asked for as it is needed, since attention over a larger buffer takes longer.
        while not sequence.prefilled:
            prompt = sequence.next_prompt_rows(prefill_chunk)
            backend.reserve(sequence.start + prompt.shape[1])
            choice = backend.prefill(prompt, sequence.starts, inject=policy.widest > 1)
            sequence.commit_prefill(prompt.shape[1])
        tokens = [int(choice[0])] if sampler is None else sampler.choose(backend.logits()[0])

        while True:
            # 2) Stop conditions, on the tokens just decided. All but the last of them were drafted.
            kept, finish_reason = _cut(tokens, max_new_tokens - len(sequence.new_tokens), stop_token_ids)
            sequence.new_tokens += kept
            yield Decoded(tuple(kept), min(len(tokens) - 1, len(kept)), finish_reason)
            if finish_reason is not None:
                return
            began = time.perf_counter()

            # 3) Inject features, draft, verify: one call, so that a backend may fuse them.
            backend.reserve(sequence.start)
            if not ahead:
                rows = policy.choose()
                inject = _due(sequence, rows, prefill_chunk) if policy.widest > 1 else None
                output = backend.step(
                    sequence.anchors,
                    sequence.starts,
                    verify_len=rows,
                    inject=inject,
                    sampling=None if sampler is None else sampler.draft_sampling(rows - 1),
                )
                injected = inject is not None
            else:
                if not launched:
                    launched.append(policy.choose())
                    backend.launch(launched[0], sequence.anchors, sequence.starts)
                # Not behind a step that may reach the length limit: there might be no room for another.
                if max_new_tokens - len(sequence.new_tokens) > launched[0]:
                    launched.append(policy.choose())
                    backend.launch(launched[-1])
                rows, injected, output = launched.popleft(), True, backend.collect()

            # 4) Accept the drafts up to the first one that the target would not have chosen. Accepted drafts
            #    equal the target's choices, so those are the tokens; the last is the bonus.
            if sampler is None:
                accepted = int(accept_greedy(output.drafted, output.verified)[0])
                tokens = output.verified[0, : accepted + 1].tolist()
            else:
                tokens = sampler.choose(backend.logits()[0], output.drafted[0].tolist(), output.proposal)

            # 5) Commit them.
            sequence.commit_step(len(tokens) - 1, rows, injected=injected)
            # A step that overlapped with the caller's own work can't be timed.
            policy.observe(rows, len(tokens) - 1, None if ahead else time.perf_counter() - began)
    except GeneratorExit:
        raise  # the caller left between two steps: nothing is broken
    except BaseException:
        # Also on KeyboardInterrupt: a half-done step may have left values that are not finite.
        backend.clear()
        raise


def _due(sequence: Sequence, verify_len: int, kept_rows: int) -> Inject | None:
    """The features to inject before such a step; a plain one waits while they are kept anyway.

    A backend keeps ``kept_rows`` at least, whose last would be the plain step's own.
    """
    waits = verify_len == 1 and sequence.start + 1 - sequence.injected <= kept_rows
    return None if waits else sequence.uninjected


def _cut(
    tokens: list[int], room: int, stop_token_ids: Set[int]
) -> tuple[list[int], Literal["stop", "length"] | None]:
    """Keep ``tokens`` up to the first stop token (included) and up to ``room``; say which it was, if any."""
    for count, token in enumerate(tokens[:room], start=1):
        if token in stop_token_ids:
            return tokens[:count], "stop"
    if len(tokens) >= room:
        return tokens[:room], "length"
    return tokens, None
