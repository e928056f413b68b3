"""Sampling from an exported bundle: defaults, log-probabilities against PyTorch, seeds on real graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dflash_export import build
from dflash_rt import Bundle, Generator, SamplingParams
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.bundle.manifest import SamplingDefaults
from dflash_rt.decoding.loop import decode
from dflash_rt.decoding.sequence import Sequence
from dflash_rt.sampling.sampler import Sampler
from tests.checkpoints import edit_json, save_drafter, save_target

PROMPT = [5, 17, 200, 3, 3, 90, 41, 8, 12, 5]
DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_target(tmp_path_factory.mktemp("pair") / "target", "llama", initializer_range=0.25)
    edit_json(folder / "generation_config.json", eos_token_id=[], **DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def bundle(target: Path) -> Bundle:
    return build(target, save_drafter(target.parent / "drafter"), target.parent / "bundle", prefill_chunk=4)


@pytest.fixture(scope="module")
def model(target: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    return loaded


@pytest.fixture
def generator(bundle: Bundle) -> Iterator[Generator]:
    with Generator(bundle, threads=1) as opened:
        yield opened


def test_defaults_come_from_the_generation_config(bundle: Bundle, generator: Generator) -> None:
    assert bundle.manifest.generation.sampling == SamplingDefaults(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.0, repetition_penalty=1.1
    )
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert generator.limits.sampling == params
    drawn = generator.generate(PROMPT, max_new_tokens=12)
    assert drawn.seed is not None
    said = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, seed=drawn.seed)
    assert generator.generate(PROMPT, max_new_tokens=12, sampling=said).token_ids == drawn.token_ids


SAMPLINGS = {
    "greedy": SamplingParams(logprobs=4),
    "sampled": SamplingParams(temperature=1.0, seed=11, logprobs=4),
    "everything": SamplingParams(
        temperature=0.8,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        seed=1,
        logprobs=4,
    ),
}


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_logprobs_are_those_of_pytorch(
    generator: Generator, model: torch.nn.Module, name: str, speculative: bool
) -> None:
    result = generator.generate(PROMPT, max_new_tokens=40, sampling=SAMPLINGS[name], speculative=speculative)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + list(result.token_ids)])).logits[0].double()
    expected = logits.log_softmax(-1)[len(PROMPT) - 1 :]
    assert result.logprobs is not None
    assert [item.token_id for item in result.logprobs] == list(result.token_ids)
    for item, row in zip(result.logprobs, expected, strict=False):
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)
        assert [value for _, value in item.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert [row[token] for token, _ in item.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["sampled", "everything"])
def test_a_seed_gives_the_same_text_at_every_width(bundle: Bundle, name: str) -> None:
    texts = set()
    for width in (1, 2, 4):
        with Generator(bundle, threads=1, num_draft_tokens=width - 1) as generator:
            for _ in range(2):
                texts.add(generator.generate(PROMPT, max_new_tokens=60, sampling=SAMPLINGS[name]).token_ids)
    assert len(texts) == 1


def test_a_seed_gives_the_same_text_however_the_prompt_is_cut(target: Path, bundle: Bundle) -> None:
    """Token by token, in uneven pieces and whole, drafted and plain; one bundle cuts it in fours."""
    whole = build(target, target.parent / "drafter", target.parent / "whole", prefill_chunk=len(PROMPT))
    prompt = np.array(PROMPT)
    backend = OnnxRuntimeBackend(whole, threads=1)
    with Generator(bundle, threads=1, num_draft_tokens=3) as generator:
        for name in ("sampled", "everything"):
            for seed in range(3):
                params = replace(SAMPLINGS[name], seed=seed)
                expected = generator.generate(PROMPT, max_new_tokens=24, sampling=params).token_ids
                for chunk, width in product((1, 3, 7, len(PROMPT)), (1, 4)):
                    sequence, sampler = Sequence(prompt), Sampler(params, prompt)
                    for _ in decode(
                        backend,
                        sequence,
                        max_new_tokens=24,
                        verify_len=width,
                        prefill_chunk=chunk,
                        sampler=sampler,
                    ):
                        pass
                    assert tuple(sequence.new_tokens) == expected, (name, seed, chunk, width)
    backend.close()


def test_logits_are_a_view_of_the_last_call(bundle: Bundle, model: torch.nn.Module) -> None:
    backend = OnnxRuntimeBackend(bundle, threads=1)
    backend.reserve(20)
    prompt = np.array([PROMPT[:4]])
    choice = backend.prefill(prompt, np.array([0]), inject=True)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT[:4]])).logits[:, -1:].numpy()
    np.testing.assert_allclose(backend.logits(), expected, atol=1e-4)
    output = backend.step(choice, np.array([4]), verify_len=4, inject=None)
    block = [*PROMPT[:4], int(choice[0]), *output.drafted[0].tolist()]
    with torch.inference_mode():
        expected = model(torch.tensor([block])).logits[:, 4:].numpy()
    assert backend.logits().shape == (1, 4, 300)  # the target's, though the drafter used the buffer before
    np.testing.assert_allclose(backend.logits(), expected, atol=1e-4)
    assert np.shares_memory(backend.logits(), backend.logits())
    assert (backend.logits().argmax(-1) == output.verified).all()
    backend.close()
