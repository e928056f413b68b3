"""The whole of decoding: prefill, then draft, verify, accept and commit until a stop condition holds.

Who owns which state:

- ``Sequence`` (sequence.py): tokens, committed rows, features not injected yet, counters. One per slot.
- ``Sampler`` (sampler.py): random numbers, counts of emitted tokens, logprobs. A greedy request has none.
- ``Backend`` (backends/): caches and all other buffers. It knows neither tokens nor acceptance.
- ``TokenStream`` (stream.py): text, times, and the generator's lock while it runs.
- ``decode`` below: nothing that outlives a step.

Why one integer is a whole rollback. A step at ``start`` first injects ALL ``width`` feature rows of the
previous verify pass at that pass's start, rejected rows too, and then writes its own block at ``start``. At
least one row of the previous pass was kept (the anchor's), so every rejected row lies inside the new block::

    previous pass   a d d x x x          a: anchor  d: accepted  x: rejected
    this block            a m m m m m    overwrites every x before anything reads it

The target's cache heals in the same way: the next verify pass covers what the last one got wrong.
"""

from __future__ import annotations

from collections.abc import Generator, Set
from dataclasses import dataclass
from typing import Literal

from dflash_rt.accept import accept_greedy
from dflash_rt.backends.base import Backend
from dflash_rt.sampler import Sampler
from dflash_rt.sequence import Sequence

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
    width: int,
    prefill_chunk: int,
    stop_token_ids: Set[int] = frozenset(),
    sampler: Sampler | None = None,
) -> Generator[Decoded, None, None]:
    """Decode; yield what the prefill decided (one token), then what each step decided.

    ``width`` is the rows of a verify pass: the anchor and ``width - 1`` drafts. ``width == 1`` is plain
    decoding, in which the drafter never runs and gets no features. ``max_new_tokens`` and ``prefill_chunk``
    are at least 1. Without a ``sampler`` tokens are the backend's own greedy choices.

    The caller may stop after any item: between steps every cache is whole. If the backend raises, its caches
    are cleared, the error passes on, and the backend can take another sequence.
    """
    try:
        # 1) Prefill. The last chunk's answer is the first token. Features are injected as they come.
        #    Room is asked for as it is needed, since attention over a larger buffer takes longer.
        while not sequence.prefilled:
            rows = sequence.next_prompt_rows(prefill_chunk)
            backend.reserve(sequence.start + rows.shape[1])
            choice = backend.prefill(rows, sequence.starts, inject=width > 1)
            sequence.commit_prefill(rows.shape[1])
        tokens = [int(choice[0])] if sampler is None else sampler.choose(backend.logits()[0])

        while True:
            # 2) Stop conditions, on the tokens just decided. All but the last of them were drafted.
            kept, finish_reason = _cut(tokens, max_new_tokens - len(sequence.new_tokens), stop_token_ids)
            sequence.new_tokens += kept
            yield Decoded(tuple(kept), min(len(tokens) - 1, len(kept)), finish_reason)
            if finish_reason is not None:
                return

            # 3) Inject the last pass's features, draft, verify: one call, so that a backend may fuse them.
            backend.reserve(sequence.start)
            output = backend.step(
                sequence.anchors,
                sequence.starts,
                width=width,
                inject=sequence.uninjected,
                sampling=None if sampler is None else sampler.draft_sampling(width - 1),
            )

            # 4) Accept the drafts up to the first one that the target would not have chosen. Accepted drafts
            #    equal the target's choices, so those are the tokens; the last is the bonus.
            if sampler is None:
                accepted = int(accept_greedy(output.drafted, output.verified)[0])
                tokens = output.verified[0, : accepted + 1].tolist()
            else:
                tokens = sampler.choose(backend.logits()[0], output.drafted[0].tolist(), output.proposal)

            # 5) Commit them.
            sequence.commit_step(len(tokens) - 1, width)
    except GeneratorExit:
        raise  # the caller left between two steps: nothing is broken
    except BaseException:
        # Also on KeyboardInterrupt: a half-done step may have left values that are not finite.
        backend.clear()
        raise


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
