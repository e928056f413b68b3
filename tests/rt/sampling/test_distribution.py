"""The proof that sampling is exact: the joint distribution of the first four tokens against PyTorch's logits.

Every setting is counted over 200,000 seeds by a walk over all prefixes with the functions that the sampler
uses. Runs of the loop must agree with it seed by seed, drafted and plain: all 200,000 of one setting through
the loop and the sampler that Generator runs, 20,000 of them through Generator as well, and of each setting
the first 300 through Generator and the first DECODED through the loop. With not one disagreement in n runs,
runs and walk disagree, at 95 % confidence, with a rate below 3 / n: 0.3 % of the runs of one setting at one
width (n is DECODED), and 0.01 % over all settings and both widths.

That is what runs as slow. What always runs is a tenth of it, FEW seeds of the settings in FAST: each way to
change the logits once, and all at once. It sees a temperature that is 15 % off, where all of it sees 5 %;
runs and walk disagree with a rate below 0.015 %.

A chi-square test fails by chance with probability LEVEL. There are fewer than 50 of them, so a correct
sampler fails one with probability below 5e-5; seeds are fixed, so that it would then fail always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from transformers.generation import logits_process

from dflash_rt.arrays import IntArray
from dflash_rt.backends.base import Backend, Inject, StepOutput
from dflash_rt.backends.scripted import ScriptedBackend
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.policy import WidthPolicy
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.generator import Generator
from dflash_rt.request import ModelLimits
from dflash_rt.sampling.distribution import Distribution, distribution, penalised, race
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.sampling.proposal import DraftSampling
from dflash_rt.sampling.random_numbers import Noise
from dflash_rt.sampling.sampler import Sampler

LEVEL = 1e-6
RUNS, FEW = 200_000, 20_000
DECODED = 1_000
VOCAB, LENGTH = 5, 4
PROMPT = (3, 0, 3)

Tokens = tuple[int, ...]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PROCESSORS = {
    "none": {},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.08},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
}
SETTINGS = {
    f"T={temperature} {name}": SamplingParams(temperature=temperature, **processors)  # type: ignore[arg-type]
    for temperature in (0.5, 1.0, 1.5)
    for name, processors in PROCESSORS.items()
}
FAST = ("T=1.0 none", "T=0.5 top-k", "T=1.5 top-p", "T=1.0 min-p", "T=1.5 penalties", "all at once")
ALL_AT_ONCE = SETTINGS["all at once"] = SamplingParams(
    temperature=1.2, top_k=4, top_p=0.95, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.5
)


# --- the models -------------------------------------------------------------------------------------------


@cache
def table(seed: int) -> dict[Tokens, npt.NDArray[np.float32]]:
    """Logits of a random PyTorch model after PROMPT and every output of up to three tokens."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(generator.normal(0, 0.8, parameter.shape)))
        logits = {}
        for length in range(LENGTH):
            outputs = list(product(range(VOCAB), repeat=length))
            rows = model(torch.tensor([PROMPT + output for output in outputs])).logits[:, -1].numpy()
            logits.update(zip(outputs, rows, strict=True))
    return logits


def target(prefix: Tokens) -> npt.NDArray[np.float32]:
    return table(0)[prefix[len(PROMPT) :][: LENGTH - 1]]  # rows behind the last token are garbage


def propose(prefix: Tokens) -> int:
    """Another model's argmax, and now and then the target's own."""
    key = prefix[len(PROMPT) :][: LENGTH - 1]
    return int(table(0 if sum(key) % 3 else 1)[key].argmax())


def drafter(prefix: Tokens, count: int) -> Tokens:
    drafted = prefix
    for _ in range(count):
        drafted = (*drafted, propose(drafted))
    return drafted[len(prefix) :]


def generator(width: int, backend: Backend | None = None) -> Generator:
    limits = ModelLimits(
        vocab_size=VOCAB, max_seq_len=20, prefill_chunk=3, block_size=5, num_draft_tokens=width - 1
    )
    return Generator.from_parts(limits, backend or ScriptedBackend.with_logits(target, drafter, block_size=5))


class TableBackend(ScriptedBackend):
    """Says what the scripted one says, without its checks, and remembers what it said: many times faster."""

    _output: Tokens = ()

    def __init__(self) -> None:
        super().__init__(lambda prefix: 0)
        self._prefilled = np.zeros(1, np.int64)
        self._said: dict[tuple[Tokens, int], tuple[StepOutput, npt.NDArray[np.float32]]] = {}

    def reserve(self, rows: int) -> None:
        pass

    def prefill(self, token_ids: IntArray, start: IntArray, *, inject: bool) -> IntArray:
        assert tuple(token_ids[0].tolist()) == PROMPT
        self._output, self._now = (), target(PROMPT)[None, None]
        return self._prefilled

    def step(
        self,
        anchors: IntArray,
        start: IntArray,
        *,
        verify_len: int,
        inject: Inject | None,
        sampling: DraftSampling | None = None,
    ) -> StepOutput:
        self._output = (*self._output[: int(start[0]) - len(PROMPT)], int(anchors[0]))
        if (self._output, verify_len) not in self._said:
            self._said[self._output, verify_len] = self._play(verify_len)
        output, self._now = self._said[self._output, verify_len]
        self._output += tuple(output.drafted[0].tolist())
        return output

    def logits(self) -> npt.NDArray[np.float32]:
        return self._now

    def _play(self, width: int) -> tuple[StepOutput, npt.NDArray[np.float32]]:
        drafted = drafter(PROMPT + self._output, width - 1)
        rows = [target(PROMPT + self._output + drafted[:row]) for row in range(width)]
        tokens = np.array([drafted], np.int64)
        return StepOutput(tokens, np.zeros((1, width), np.int64)), np.array([rows])


# --- the exact distribution, by transformers --------------------------------------------------------------


def exact_row(params: SamplingParams, output: Tokens) -> Floats:
    """The next token's probabilities, float64, by transformers' own processors."""
    ids = torch.tensor([PROMPT + output])
    scores = torch.from_numpy(table(0)[output])[None].double()
    scores = logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token in range(VOCAB):  # as OpenAI defines them
        times = output.count(token)
        scores[0, token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    scores = logits_process.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = logits_process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = logits_process.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = logits_process.MinPLogitsWarper(params.min_p)(ids, scores)
    probabilities: Floats = scores.softmax(-1)[0].numpy()
    return probabilities


def exact(params: SamplingParams) -> Floats:
    """Probability of every output of four tokens, float64 ``[5 * 5 * 5 * 5]``."""
    joint = np.ones(1)
    for length in range(LENGTH):
        rows = [exact_row(params, output) for output in product(range(VOCAB), repeat=length)]
        joint = (joint[:, None] * np.array(rows)).ravel()
    return joint


def p_value(counts: Counts, probabilities: Floats) -> float:
    """Chi-square of counts against probabilities; cells that expect fewer than 10 are one cell.

    0 if anything impossible was counted.
    """
    expected = probabilities * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    small = expected < 10
    found = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    if wanted[-1] < 10:
        found[-2:], wanted[-2:] = (found[-2:].sum(), 0), (wanted[-2:].sum(), 0)
        found, wanted = found[:-1], wanted[:-1]
    assert len(found) > 1
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = len(found) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))


# --- 200,000 runs -----------------------------------------------------------------------------------------


@cache
def noises(runs: int) -> Floats:
    """The random numbers of the first seeds, float64 ``[runs, 4, vocab]``."""
    return np.array([[noise.at(i, VOCAB) for i in range(LENGTH)] for noise in map(Noise, range(runs))])


def our_distribution(params: SamplingParams, output: Tokens) -> Distribution:
    logits = table(0)[output]
    if params.has_penalties:
        ids, counts = np.unique(np.array(output, np.int64), return_counts=True)
        logits = penalised(
            logits,
            params,
            seen=np.unique(np.array(PROMPT + output)),
            output=ids,
            counts=counts.astype(np.float32),
        )
    return distribution(logits, params)


def pick_all(p: Distribution, noise: Floats) -> Counts:
    """``p.pick`` of each row of ``noise``."""
    ids = np.arange(VOCAB) if p.ids is None else p.ids
    return ids[race(p.weights, noise[:, ids])]


Choose = Callable[[Distribution, int, Floats, Floats], Counts]
"""Distribution, draft, noise and one more number for each run -> token of each run."""


def coupled(p: Distribution, draft: int, noise: Floats, more: Floats) -> Counts:
    """What the sampler does: the draft stands if it is the token."""
    return pick_all(p, noise)


def walk(params: SamplingParams, runs: int, choose: Choose = coupled, stale: bool = False) -> Counts:
    """Outputs of the first seeds, int64 ``[runs, 4]``, prefix by prefix.

    With ``stale`` penalties count the tokens up to the anchor, as if the block's own didn't matter.
    """
    noise = noises(runs)
    more = np.random.default_rng(5).random((runs, LENGTH))
    tokens = np.zeros((runs, LENGTH), np.int64)
    groups: dict[Tokens, npt.NDArray[np.intp]] = {(): np.arange(runs)}
    for position in range(LENGTH):
        longer = {}
        for output, these in groups.items():
            if stale and output:
                raw = table(0)[output]
                seen = np.unique(np.array(PROMPT + output[:1]))
                counted = np.array(output[:1]), np.ones(1, np.float32)
                p = distribution(
                    penalised(raw, params, seen=seen, output=counted[0], counts=counted[1]), params
                )
            else:
                p = our_distribution(params, output)
            if position == 0:  # the prefill's token is never drafted
                chosen = pick_all(p, noise[these, 0])
            else:
                chosen = choose(p, propose(PROMPT + output), noise[these, position], more[these, position])
            tokens[these, position] = chosen
            for token in np.unique(chosen):
                longer[(*output, int(token))] = these[chosen == token]
        groups = longer
    return tokens


def count(tokens: Counts) -> Counts:
    cells = tokens @ VOCAB ** np.arange(LENGTH - 1, -1, -1)
    return np.bincount(cells, minlength=VOCAB**LENGTH)


def requests(params: SamplingParams, runs: int, *, width: int, backend: Backend | None = None) -> Counts:
    """Outputs of the first seeds as whole requests, int64 ``[runs, 4]``."""
    values = {name: getattr(params, name) for name in params.__dataclass_fields__}
    prompt = list(PROMPT)
    tokens = np.empty((runs, LENGTH), np.int64)
    with generator(width, backend) as running:
        for seed in range(runs):
            result = running.generate(
                prompt, max_new_tokens=LENGTH, sampling=SamplingParams(**values | {"seed": seed})
            )
            tokens[seed] = result.token_ids
    return tokens


def decoded(
    params: SamplingParams, runs: int, widths: Callable[[int], int | WidthPolicy], backend: Backend
) -> Counts:
    """Outputs of the first seeds by the loop alone, int64 ``[runs, 4]``; ``widths`` of each seed."""
    prompt = np.array(PROMPT, np.int64)
    tokens = np.empty((runs, LENGTH), np.int64)
    for seed in range(runs):
        sequence = Sequence(prompt)
        for _ in decode(
            backend,
            sequence,
            max_new_tokens=LENGTH,
            verify_len=widths(seed),
            prefill_chunk=len(PROMPT),
            sampler=Sampler(replace(params, seed=seed), prompt),
        ):
            pass
        tokens[seed] = sequence.new_tokens
    return tokens


# --- tests ------------------------------------------------------------------------------------------------


def few_and_all(*fast: str) -> list[Any]:
    """Each of ``fast`` with FEW runs; every setting with all of them is slow."""
    every = [pytest.param(name, RUNS, marks=pytest.mark.slow) for name in SETTINGS]
    return [(name, FEW) for name in fast] + every


@pytest.mark.parametrize(("name", "runs"), few_and_all(*FAST))
def test_the_joint_distribution_is_that_of_pytorch(name: str, runs: int) -> None:
    params = SETTINGS[name]
    tokens = walk(params, runs)
    assert p_value(count(tokens), exact(params)) > LEVEL
    for width in (1, 3, 5):  # and so of whole requests, plain and drafted
        assert (requests(params, 300, width=width) == tokens[:300]).all(), width
    for width in (1, 5):
        found = decoded(params, DECODED, lambda seed, width=width: width, TableBackend())  # type: ignore[misc]
        assert (found == tokens[:DECODED]).all(), width


@pytest.mark.parametrize("runs", [FEW, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_whole_requests_have_the_joint_distribution(runs: int) -> None:
    params = SETTINGS["T=1.0 none"]
    tokens = decoded(params, runs, lambda _: 5, TableBackend())
    assert p_value(count(tokens), exact(params)) > LEVEL
    assert (tokens == walk(params, runs)).all()
    asked = requests(params, runs // 10, width=5, backend=TableBackend())
    assert (asked == tokens[: len(asked)]).all()


def residual(p: Distribution, draft: int, noise: Floats, more: Floats) -> Counts:
    """The rule as papers write it: accept with p(x), else resample from p without x."""
    dense = p.probabilities(VOCAB)
    without = np.where(np.arange(VOCAB) == draft, 0, dense).astype(np.float32)
    accepted = more < dense[draft]
    if accepted.all():
        return np.full(len(more), draft)
    return np.where(accepted, draft, pick_all(Distribution(without), noise))


def wrong_residual(p: Distribution, draft: int, noise: Floats, more: Floats) -> Counts:
    """Resamples from p itself: x gets a second chance."""
    accepted = more < p.probabilities(VOCAB)[draft]
    return np.where(accepted, draft, pick_all(p, noise))


@pytest.mark.parametrize("runs", [FEW, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_accepting_and_resampling_is_the_same_distribution(runs: int) -> None:
    for params in (SETTINGS["T=1.0 none"], ALL_AT_ONCE):
        assert p_value(count(walk(params, runs, residual)), exact(params)) > LEVEL


@pytest.mark.parametrize(("name", "runs"), few_and_all(*FAST))
def test_a_wrong_residual_fails(name: str, runs: int) -> None:
    params = SETTINGS[name]
    assert p_value(count(walk(params, runs, wrong_residual)), exact(params)) < LEVEL


@pytest.mark.parametrize("runs", [FEW, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_penalties_that_forget_the_block_fail(runs: int) -> None:
    params = SETTINGS["T=1.0 penalties"]
    assert p_value(count(walk(params, runs, stale=True)), exact(params)) < LEVEL


@pytest.mark.parametrize(
    ("temperature", "runs"), [(1.15, FEW), pytest.param(1.05, RUNS, marks=pytest.mark.slow)]
)
def test_a_sampler_that_is_slightly_wrong_fails(temperature: float, runs: int) -> None:
    """200,000 runs see a twentieth off in temperature; a tenth of them sees three times that."""
    tokens = walk(SamplingParams(temperature=temperature), runs)
    assert p_value(count(tokens), exact(SETTINGS["T=1.0 none"])) < LEVEL


def test_the_settings_exercise_what_they_name() -> None:
    plain = exact(SETTINGS["T=1.0 none"])
    for name, params in SETTINGS.items():
        joint = exact(params)
        assert abs(joint.sum() - 1) < 1e-12
        assert (joint == 0).any() == any(part in name for part in ("top", "min-p", "all"))
        if name != "T=1.0 none":
            assert abs(joint - plain).sum() > 0.05
    with generator(5) as running:  # and drafts are accepted in part
        sampling = [SamplingParams(temperature=1.0, seed=seed) for seed in range(300)]
        runs = [running.generate(list(PROMPT), max_new_tokens=LENGTH, sampling=s) for s in sampling]
    assert {run.stats.accepted_per_step[0] for run in runs} == {0, 1, 2, 3, 4}
