"""Decoding in PyTorch: plainly by Hugging Face ``generate``, drafted by the loop of PyPI ``dflash``."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dflash_bench.systems.base import BenchSetup, Outcome, System, missing, require_fp32

if TYPE_CHECKING:
    import torch

__all__ = ["HuggingFace", "ReferenceLoop", "make_hf", "make_reference", "target_model"]


def make_hf(setup: BenchSetup) -> Sequence[System]:
    """Plain Hugging Face ``generate``.

    Raises:
        BackendUnavailableError: torch or transformers isn't installed, or the bundle isn't fp32.
        DFlashError: the target can't be found or loaded, or isn't the one that the bundle was built from.
    """
    require_fp32(setup, "hf")
    return [HuggingFace(target_model(setup, "hf"), setup.stop_token_ids, setup.threads)]


class HuggingFace:
    """``generate`` with a streamer, which hears of every token when it is decided.

    ``model`` is on a CPU, where ``threads`` threads compute, or on a GPU.
    """

    name = "hf"
    num_draft_tokens = None

    def __init__(self, model: Any, stop_token_ids: Sequence[int] = (), threads: int | None = None) -> None:
        self._model = model
        self._stops = list(stop_token_ids)
        self._threads = threads

    def decode(self, prompt: Sequence[int], max_new_tokens: int, /) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`."""
        import torch

        transformers: Any = importlib.import_module("transformers")  # its types are incomplete
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._stops or None,
            pad_token_id=self._stops[0] if self._stops else 0,
        )
        input_ids = torch.tensor([list(prompt)], device=self._model.device)
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
        tokens = tuple(output[0, len(prompt) :].tolist())
        first, last = clock.times[0], clock.times[-1]
        seconds = tuple(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))
        return Outcome(tokens, first - began, last - first, len(tokens) - 1, step_seconds=seconds)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class _TokenClock:
    """A streamer for ``generate`` that notes when each new token was on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then one token at a time, each copied to the host before."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the last token has its time already."""


def make_reference(setup: BenchSetup) -> Sequence[System]:
    """The loop of PyPI ``dflash``, once for each number of draft tokens.

    Raises:
        BackendUnavailableError: a package is missing, or the bundle isn't fp32.
        DFlashError: as in :func:`make_hf`, for target and drafter.
    """
    require_fp32(setup, "reference")
    with _needs_torch("reference"):
        from dflash_export.reference import load_drafter, reference_version
    if reference_version() is None:
        raise missing("reference", "dflash", "pip install --no-deps dflash==0.1.0")
    target = target_model(setup, "reference")
    drafter = load_drafter(_checkpoint(setup, "drafter"))
    return [
        ReferenceLoop(drafter, target, count, setup.stop_token_ids, setup.threads)
        for count in setup.num_draft_tokens
    ]


class ReferenceLoop:
    """The reference's own loop and its own clock, which stands between prefill and decoding.

    It clips its last blocks to the tokens still wanted, so that the last of its steps are narrower than
    others'. That can only make it look faster.
    """

    def __init__(
        self,
        drafter: Any,
        target: Any,
        num_draft_tokens: int,
        stop_token_ids: Sequence[int] = (),
        threads: int | None = None,
    ) -> None:
        self.name = f"reference-{num_draft_tokens}"
        self.num_draft_tokens: int | None = num_draft_tokens
        self._block_size = num_draft_tokens + 1
        self._models = (drafter, target)
        self._stops = stop_token_ids
        self._threads = threads

    def decode(self, prompt: Sequence[int], max_new_tokens: int, /) -> Outcome:
        """See :class:`~dflash_bench.systems.base.System`."""
        from dflash_export.reference import generate_reference

        with _torch_threads(self._threads):
            run = generate_reference(
                *self._models,
                prompt,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self._stops,
                block_size=self._block_size,
            )
        return Outcome(run.token_ids, run.prefill_seconds, run.decode_seconds, len(run.tokens_by_step))

    def close(self) -> None:
        """Let go of the models."""
        self._models = (None, None)


def target_model(setup: BenchSetup, name: str) -> Any:
    """The target as transformers loads it, in fp32, once for all systems. The system ``name`` needs it."""
    with _needs_torch(name):
        from dflash_export.reference import load_target

    if "torch target" not in setup.shared:
        setup.shared["torch target"] = load_target(_checkpoint(setup, "target"))
    return setup.shared["torch target"]


def _checkpoint(setup: BenchSetup, role: Literal["target", "drafter"]) -> Any:
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


@contextlib.contextmanager
def _needs_torch(name: str) -> Iterator[None]:
    """Turn the lack of a package of the exporter into BackendUnavailableError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(name, error.name or "a package", "pip install 'dflash-export[export]'") from error


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """PyTorch's number of CPU threads for this block only: the setting belongs to the process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
