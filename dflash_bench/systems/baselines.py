"""What ``dflash-rt bench`` compares with: Hugging Face, the reference's loop and onnxruntime-genai.

All of them decode the checkpoint that the bundle was built from, in fp32 (genai also in its own int4),
greedily, on as many threads as the bundle does. ``dflash_rt`` finds the factories below by entry points, so
that it never imports PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dflash_bench.systems.base import BenchSetup, Contender, Outcome
from dflash_bench.systems.genai_model import Precision, genai_model
from dflash_rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    import torch

__all__ = ["make_genai", "make_genai_int4", "make_hf", "make_reference"]


def make_hf(setup: BenchSetup) -> Sequence[Contender]:
    """Plain Hugging Face ``generate``.

    Raises:
        BackendUnavailableError: torch or transformers isn't installed, or the bundle isn't fp32.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    _require_fp32(setup, "hf")
    return [_HuggingFace(_target(setup, "hf"), setup)]


def make_reference(setup: BenchSetup) -> Sequence[Contender]:
    """The loop of PyPI ``dflash``, once for each draft width.

    Raises:
        BackendUnavailableError: a package is missing, or the bundle isn't fp32.
        DFlashError: as in :func:`make_hf`, for the target and for the drafter.
    """
    _require_fp32(setup, "reference")
    with _needs_torch("reference"):
        from dflash_export.reference import load_drafter, reference_version
    if reference_version() is None:
        raise _missing("reference", "dflash", "pip install --no-deps dflash==0.1.0")
    target = _target(setup, "reference")
    drafter = load_drafter(_source(setup, "drafter"))
    return [_Reference(drafter, target, setup, width) for width in setup.draft_widths]


def make_genai(setup: BenchSetup) -> Sequence[Contender]:
    """onnxruntime-genai's plain decoding, on a model that its own builder makes from the same weights.

    The first time this takes a while; the model is kept in the cache folder.

    Raises:
        BackendUnavailableError: the package isn't installed, its builder fails, or the bundle isn't fp32.
        OutputError: the cache folder can't be written.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    return _make_genai("genai", setup, "fp32")


def make_genai_int4(setup: BenchSetup) -> Sequence[Contender]:
    """The same on the model that its builder makes of these weights in int4, by the builder's own defaults.

    Raises:
        As :func:`make_genai`.
    """
    return _make_genai("genai-int4", setup, "int4")


def _make_genai(name: str, setup: BenchSetup, precision: Precision) -> Sequence[Contender]:
    _require_fp32(setup, name)
    try:
        library = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        remedy = "pip install --no-deps onnxruntime-genai==0.18.0"
        raise _missing(name, "onnxruntime-genai", remedy) from error
    folder = genai_model(setup, lambda: _target(setup, name), precision)
    return [_GenAI(name, library, folder, setup)]


class _HuggingFace:
    """``generate`` with a streamer, which hears of every token when it is decided."""

    name = "hf"
    width = None

    def __init__(self, model: Any, setup: BenchSetup) -> None:
        self._model = model
        self._stops = setup.stop_token_ids
        self._threads = setup.threads

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Outcome:
        """See :class:`~dflash_bench.systems.base.Contender`."""
        import torch

        config = _transformers().GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._stops) or None,
            pad_token_id=self._stops[0] if self._stops else 0,
        )
        input_ids = torch.tensor([list(prompt_ids)])
        clock = _TokenClock()
        with _torch_threads(self._threads):
            began = time.perf_counter()
            output = self._model.generate(
                input_ids,
                # Left out, prompt tokens that equal the pad id would be taken for padding.
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                streamer=clock,
            )
        tokens = tuple(output[0, len(prompt_ids) :].tolist())
        first, last = clock.times[0], clock.times[-1]
        return Outcome(tokens, first - began, last - first, len(tokens) - 1)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class _TokenClock:
    """A streamer for ``generate`` that notes when each new token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then one token at a time."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the last token has its time already."""


class _Reference:
    """The reference's own loop and its own clock, which stands between prefill and decoding."""

    def __init__(self, drafter: Any, target: Any, setup: BenchSetup, width: int) -> None:
        self.name = f"reference-{width}"
        self.width: int | None = width
        self._models = (drafter, target)
        self._rows = width
        self._stops = setup.stop_token_ids
        self._threads = setup.threads

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Outcome:
        """See :class:`~dflash_bench.systems.base.Contender`."""
        from dflash_export.reference import generate_reference

        with _torch_threads(self._threads):
            run = generate_reference(
                *self._models,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self._stops,
                block_size=self._rows,
            )
        return Outcome(run.token_ids, run.prefill_seconds, run.decode_seconds, len(run.tokens_by_step))

    def close(self) -> None:
        """Let go of the models."""
        self._models = (None, None)


class _GenAI:
    """One token a call; its prefill ends with the first one."""

    width = None

    def __init__(self, name: str, library: Any, folder: Path, setup: BenchSetup) -> None:
        self.name = name
        self._library = library
        self._stops = frozenset(setup.stop_token_ids)
        config = library.Config(str(folder))
        threads = {"intra_op_num_threads": setup.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        # A single id replaces the target's own stop tokens, a list adds to them; none can't be said.
        for place, stop in enumerate(setup.stop_token_ids):
            config.overlay(json.dumps({"model": {"eos_token_id": [stop] if place else stop}}))
        try:
            self._model = library.Model(config)
            self.decode([0], 2)  # its kernels refuse some head sizes, and only when they run
        except Exception as error:  # its classes share no public base
            raise BackendUnavailableError(
                "onnxruntime-genai can't run the target",
                found=" ".join(str(error).split())[:300],
                expected="a model that its kernels support",
                remedy=f"leave {name} out of --compare",
            ) from error

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Outcome:
        """See :class:`~dflash_bench.systems.base.Contender`."""
        began = time.perf_counter()
        parameters = self._library.GeneratorParams(self._model)
        # As long as it has to be: its attention costs time for every row of its caches, too.
        parameters.set_search_options(
            do_sample=False, repetition_penalty=1.0, max_length=len(prompt_ids) + max_new_tokens
        )
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt_ids, np.int32))
        generator.generate_next_token()
        tokens = [int(generator.get_next_tokens()[0])]
        first = last = time.perf_counter()
        while len(tokens) < max_new_tokens and tokens[-1] not in self._stops and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            last = time.perf_counter()
        return Outcome(tuple(tokens), first - began, last - first, len(tokens) - 1)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


# Checkpoints. What two contenders need is loaded once.


def _target(setup: BenchSetup, name: str) -> Any:
    """The target as transformers loads it, in fp32. ``name`` is whom it is for."""
    with _needs_torch(name):
        from dflash_export.reference import load_target

    return _once(setup, "torch target", lambda: load_target(_source(setup, "target")))


def _source(setup: BenchSetup, role: Literal["target", "drafter"]) -> Any:
    """Where a checkpoint is: the option, else the recipe's, else the hub id in the manifest."""
    from dflash_export.recipe import PACKAGE_PREFIX, locate_package_file, read_recipe
    from dflash_export.reference import find_source

    spec = setup.target if role == "target" else setup.drafter
    if spec is None and setup.recipe is not None:
        spec = read_recipe(setup.recipe)[role]
    if spec is not None and spec.startswith(PACKAGE_PREFIX):
        spec = str(locate_package_file(spec))
    manifest = setup.bundle.manifest
    return find_source(role, manifest.target.source if role == "target" else manifest.drafter.source, spec)


def _once(setup: BenchSetup, name: str, make: Callable[[], Any]) -> Any:
    if name not in setup.shared:
        setup.shared[name] = make()
    return setup.shared[name]


# Conditions


def _require_fp32(setup: BenchSetup, name: str) -> None:
    precision = setup.bundle.manifest.precision
    if precision != "fp32":
        raise BackendUnavailableError(
            f"{name} decodes in fp32 and the bundle doesn't",
            found=f"a bundle of precision {precision}",
            expected="fp32: anything else would compare two different things",
            remedy=f"leave {name} out of --compare, or build the bundle with --precision fp32",
        )


@contextlib.contextmanager
def _needs_torch(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(name, error.name or "a package", "pip install 'dflash-export[export]'") from error


def _missing(name: str, package: str, remedy: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{name} can't be compared with",
        found=f"{package} isn't installed",
        expected=f"the package {package}",
        remedy=f"{remedy}; or leave it out of --compare",
    )


def _transformers() -> Any:
    """The module without its types, which are incomplete."""
    return importlib.import_module("transformers")


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """As many threads as everyone has, for this block only: the setting belongs to the process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
