"""Steps of changing width on exported graphs: drafts are as if the drafter had seen every row at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import pytest

from dflash_export import build
from dflash_rt import Bundle, Generator
from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Inject, StepOutput
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.sampling.proposal import DraftSampling
from tests.pairs import TargetSpec, drafter_config, make_drafter, make_target

BLOCK, CHUNK = 5, 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("widths")
    spec = TargetSpec("qwen3", vocab=12, tied=False)
    make_target(folder / "target", spec, seed=3, spread=0.3)
    raw = drafter_config(spec, layers=2, block_size=BLOCK)
    make_drafter(folder / "drafter", raw, seed=3, spread=0.2)
    return build(folder / "target", folder / "drafter", folder / "bundle", prefill_chunk=CHUNK)


@dataclass
class Told:
    """A policy that is told its widths, again and again."""

    widths: list[int]
    widest: int = BLOCK
    chosen: int = 0

    def choose(self) -> int:
        self.chosen += 1
        return self.widths[(self.chosen - 1) % len(self.widths)]

    def observe(self, width: int, accepted: int, seconds: float | None = None) -> None:
        pass


class Watched(OnnxRuntimeBackend):
    """Notes what every step drafted."""

    drafts: list[tuple[int, IntArray]]

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        output = super().step(anchors, start, verify_len=verify_len, inject=inject, sampling=sampling)
        self.drafts.append((int(start[0]), output.drafted[0]))
        return output


PATTERNS = {
    "wide and plain": [BLOCK, 1],
    "all widths": [5, 1, 4, 1, 1, 3, 2, 1],
    "a wide one after more plain ones than are kept": [*[1] * (3 * CHUNK + 1), BLOCK, BLOCK],
    "just as many as are kept": [*[1] * CHUNK, BLOCK],
    "one more": [*[1] * (CHUNK + 1), 2, BLOCK],
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("rows", [3, 11, 220])  # 220: the caches grow while features are kept
def test_drafts_are_those_of_a_drafter_that_saw_every_row(bundle: Bundle, name: str, rows: int) -> None:
    prompt = np.random.default_rng(rows).integers(0, 12, rows)
    backend = Watched(bundle, threads=1)
    backend.drafts = []
    sequence, widths = Sequence(prompt), Told(PATTERNS[name])
    for _ in decode(backend, sequence, max_new_tokens=60, verify_len=widths, prefill_chunk=CHUNK):
        pass
    plain = Sequence(prompt)
    for _ in decode(backend, plain, max_new_tokens=60, verify_len=1, prefill_chunk=CHUNK):
        pass
    assert sequence.new_tokens == plain.new_tokens
    text = np.array([*prompt, *plain.new_tokens])
    drafted = [(start, tokens) for start, tokens in backend.drafts if tokens.size]
    assert len(drafted) >= 2
    for start, tokens in drafted:
        backend.reserve(start)
        for first in range(0, start, CHUNK):
            chunk = text[None, first : min(first + CHUNK, start)]
            backend.prefill(chunk, np.array([first]), inject=True)
        fresh = OnnxRuntimeBackend.step(
            backend, text[start : start + 1], np.array([start]), verify_len=tokens.size + 1, inject=None
        )
        assert fresh.drafted[0].tolist() == tokens.tolist(), f"row {start}"


def test_auto_gives_the_tokens_of_plain_decoding(bundle: Bundle) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with Generator(bundle, threads=1, num_draft_tokens="auto") as generator:
        assert generator.step_costs is not None
        assert generator.step_costs.widest == BLOCK
        plain = generator.generate(prompt, max_new_tokens=80, stop_token_ids=[], speculative=False)
        for _ in range(3):
            adapted = generator.generate(prompt, max_new_tokens=80, stop_token_ids=[])
            assert adapted.token_ids == plain.token_ids
        assert adapted.stats.num_draft_tokens == BLOCK - 1
    # Kept in the bundle, perhaps corrected by these requests. It stays whole.
    kept = bundle.root / "reports" / "step_costs.json"
    before = kept.read_bytes()
    with Generator(Bundle.open(bundle.root, verify_files=True), threads=1, num_draft_tokens="auto") as again:
        assert again.step_costs is not None
        assert again.step_costs.widest == BLOCK
    assert kept.read_bytes() == before
    assert bundle.unlisted_files() == ()


def test_twins_in_the_middle_of_different_sequences_give_what_they_give_alone(bundle: Bundle) -> None:
    """On the same sessions, each with caches of its own; also after one of them is closed."""
    prompts = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8] * 5, [1, 1, 2, 3])
    widths = (1, BLOCK, 3)

    def tokens(backend: OnnxRuntimeBackend, index: int) -> Iterator[tuple[int, ...]]:
        steps = decode(
            backend,
            Sequence(np.array(prompts[index])),
            max_new_tokens=150,  # the caches grow on the way
            verify_len=widths[index],
            prefill_chunk=CHUNK,
        )
        return (step.token_ids for step in steps)

    first = OnnxRuntimeBackend(bundle, threads=1)
    alone = [[*chain.from_iterable(tokens(first, index))] for index in range(3)]
    twins = [first, first.share_weights(), first.share_weights()]
    together = [list[int]() for _ in twins]
    turns = zip_longest(*(tokens(twin, index) for index, twin in enumerate(twins)), fillvalue=())
    for turn in turns:
        for index, found in enumerate(turn):
            together[index] += found
    assert together == alone
    first.close()
    assert [*chain.from_iterable(tokens(twins[1], 1))] == alone[1]
    assert first.cache_bytes == 0
    assert twins[1].cache_bytes > 0
