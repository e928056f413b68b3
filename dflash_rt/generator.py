"""The public entry: a bundle on a backend, ready for requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from inspect import signature
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from dflash_rt.backends import create_backend
from dflash_rt.backends.base import Backend
from dflash_rt.bundle.folder import Bundle
from dflash_rt.decoding.policy import FixedWidth, WidthPolicy
from dflash_rt.errors import BackendError, BundleError, RequestError
from dflash_rt.request import ModelLimits, NumDraftTokens, Request, check_count, check_ids
from dflash_rt.request_lock import RequestLock
from dflash_rt.sampling.params import SamplingParams
from dflash_rt.speculation.width import AcceptanceHistory, AdaptiveWidth
from dflash_rt.speculation.width_cache import CostKey, cost_key, load_step_costs, save_step_costs
from dflash_rt.speculation.width_correction import RunningCosts, StepCosts
from dflash_rt.speculation.width_cost import measure_step_costs
from dflash_rt.stream import GenerationResult, TokenStream
from dflash_rt.text.prompts import Prompt, PromptEncoder
from dflash_rt.text.stop_strings import TextAssembler

__all__ = ["Generator"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_MOVED = 1.05  # stored costs are written again when one has changed by more than this factor


def _takes_arguments_of(other: Callable[_P, object]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Give a method the parameters of another, for type checkers and for ``help``."""

    def declare(method: Callable[..., _R]) -> Callable[_P, _R]:
        returned = signature(method).return_annotation
        method.__signature__ = signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return method

    return declare


class Generator:
    """Generates text from a bundle. Open from its construction until :meth:`close`.

    One generator may be called from several threads: a request runs alone, and others wait for it. A stream
    counts as running from its first chunk to its end.

        >>> with Generator("engines/smollm2-135m") as generator:
        ...     print(generator.generate("Why is the sky blue?", max_new_tokens=64).text)

    Args:
        bundle: a bundle's folder, or an open :class:`~dflash_rt.bundle.folder.Bundle`.
        backend: a name of :data:`dflash_rt.backends.BACKEND_NAMES`, or a backend object, which the generator
            then owns and closes.
        threads: CPU threads of the backend; ``None`` leaves it to the backend.
        backend_options: options of the backend of that name, such as ``{"memory_limit": 8 * 10**9}``; see
            docs/guide/gpu.md. A backend refuses those that it doesn't have.
        num_draft_tokens: tokens that a step drafts. A number, 0 (no drafting) to the drafter's block size
            less one, is that of every step. ``None``: each step drafts as many as promise most tokens per
            second, from 0 to the bundle's ``num_draft_tokens``; ``"auto"``: from 0 to the block size less
            one. For these two the cost of a step at each length is read from the bundle's ``reports/``, or
            measured, which takes a second, and written there if that is possible. See docs/guide/width.md.
        verify_files: compare the SHA-256 of every file first, which reads the whole bundle.

    Raises:
        BundleError: the bundle can't be used.
        BackendError: the backend can't be loaded.
        RequestError: ``threads``, ``backend_options`` or ``num_draft_tokens`` is wrong.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str | Backend = "onnxruntime",
        *,
        threads: int | None = None,
        backend_options: Mapping[str, Any] | None = None,
        num_draft_tokens: NumDraftTokens = None,
        verify_files: bool = False,
    ) -> None:
        opened = _open(bundle, verify_files)
        limits = ModelLimits.from_manifest(opened.manifest, num_draft_tokens=num_draft_tokens)
        prompts = PromptEncoder.from_bundle(opened)
        # Made last: it must be closed if a later line fails.
        runner = _backend(opened, backend, threads, backend_options)
        try:
            # Caches of full size may be smaller than the bundle allows.
            longest = limits.max_seq_len if runner.max_seq_len is None else runner.max_seq_len
            limits = replace(limits, max_seq_len=min(limits.max_seq_len, longest))
            fewer = range(limits.num_draft_tokens) if limits.adaptive else (0,)
            runner.warm_up(sorted({1 + drafts for drafts in (*fewer, limits.num_draft_tokens)}))
            costs = key = None
            if limits.adaptive:
                # The key describes neither a backend object that the caller made nor a GPU, so their costs
                # aren't stored.
                key = cost_key(opened, runner.name, threads) if backend == "onnxruntime" else None
                costs = _step_costs(opened, key, runner, limits)
            self._set_parts(limits, runner, prompts, costs, None if key is None else (opened, key))
        except BaseException:
            runner.close()
            raise

    @classmethod
    def from_parts(
        cls,
        limits: ModelLimits,
        backend: Backend,
        prompts: PromptEncoder | None = None,
        *,
        step_costs: StepCosts | None = None,
    ) -> Generator:
        """A generator without a bundle, such as one on :class:`dflash_rt.backends.scripted.ScriptedBackend`.

        It owns ``backend`` and closes it. Without ``prompts`` it takes token ids only. ``step_costs`` of
        adaptive limits, for 0 to their ``num_draft_tokens`` drafts, are measured if they aren't given.
        """
        generator = cls.__new__(cls)
        if limits.adaptive and step_costs is None:
            step_costs = measure_step_costs(backend, limits)
        generator._set_parts(limits, backend, prompts or PromptEncoder(), step_costs)
        return generator

    def _set_parts(
        self,
        limits: ModelLimits,
        backend: Backend,
        prompts: PromptEncoder,
        costs: StepCosts | None,
        kept: tuple[Bundle, CostKey] | None = None,
    ) -> None:
        if limits.adaptive and (costs is None or costs.widest != limits.num_draft_tokens + 1):
            raise RequestError(
                "the step costs don't fit num_draft_tokens",
                found=None if costs is None else f"costs of 0 to {costs.widest - 1} drafts",
                expected=f"costs of 0 to {limits.num_draft_tokens} drafts",
                remedy="measure them with these limits, or leave them out",
            )
        self._limits = limits
        self._backend = backend
        self._prompts = prompts
        self._costs = costs
        self._kept = kept  # where corrected costs are written
        # Corrected apart, since choosing from logits adds time for each row of a step.
        self._greedy_costs = None if costs is None else RunningCosts(costs)
        self._sampled_costs = None if costs is None else RunningCosts(costs)
        self._history = AcceptanceHistory(limits.num_draft_tokens + 1)
        self._lock = RequestLock()

    @property
    def limits(self) -> ModelLimits:
        """Sizes and defaults that requests are checked against."""
        return self._limits

    @property
    def step_costs(self) -> StepCosts | None:
        """Seconds of a step with 0, 1, … drafts, as measured or read; ``None`` if their number is fixed.

        Requests correct a copy of them.
        """
        return self._costs

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._lock.closed

    def encode(self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids that :meth:`generate` would feed in for ``prompt``. Raises RequestError."""
        return check_ids(
            "the prompt", self._prompts.encode(prompt, chat_template_kwargs), self._limits.vocab_size
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | SequenceOf[str] = (),
        stop_token_ids: Collection[int] | None = None,
        speculative: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokenStream:
        """Check a request and return the iterator that runs it, chunk by chunk.

        Args:
            prompt: text, a list of chat messages, or token ids. Text gets the special tokens that the
                tokenizer adds by itself; a chat is rendered by the bundle's template.
            max_new_tokens: tokens to generate at most; ``None`` for as many as the bundle's limit allows.
            sampling: how tokens are chosen; ``None`` for the bundle's defaults, which are those of the
                target's generation config. ``SamplingParams()`` is greedy decoding.
            stop: strings that end the text just before them. One string may be given alone.
            stop_token_ids: ids that end the text; ``None`` for the bundle's, ``[]`` for none.
            speculative: ``False`` for plain decoding, one token at a time, on the same graphs. Greedy tokens
                and the tokens of a seed are the same either way.
            chat_template_kwargs: variables of the chat template, over the bundle's defaults.

        Raises (now, before any work; never at the first chunk):
            PromptError: the prompt is empty, has a wrong type or ids outside the vocabulary, or is text while
                the bundle has no tokenizer.
            ChatTemplateError: there is no chat template, or it fails.
            ContextLengthError: prompt and output together exceed ``max_seq_len``.
            SamplingError: ``sampling`` isn't a SamplingParams.
            RequestError: another argument is wrong (base class of all above).
            GeneratorStateError: the generator is closed.
        """
        self._lock.require_open()
        request = Request.check(
            self._limits,
            self._prompts.encode(prompt, chat_template_kwargs),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            speculative=speculative,
        )
        text = TextAssembler(self._prompts.tokenizer, [stop] if isinstance(stop, str) else stop)
        return TokenStream(
            self._backend,
            request,
            text,
            prefill_chunk=self._limits.prefill_chunk,
            lock=self._lock,
            widths=self._widths(request),
        )

    @_takes_arguments_of(stream)
    def generate(self, *args: Any, **options: Any) -> GenerationResult:
        """Run a request to its end. Arguments and errors: those of :meth:`stream`, and BackendError."""
        with self.stream(*args, **options) as stream:
            for _ in stream:
                pass
        return stream.result

    def _widths(self, request: Request) -> WidthPolicy:
        costs = self._sampled_costs if request.sampling.needs_logits else self._greedy_costs
        if request.adaptive and costs is not None:
            return AdaptiveWidth(costs, self._history)
        return FixedWidth(request.num_draft_tokens + 1)

    def close(self) -> None:
        """Free the backend. Safe to call twice; later requests raise GeneratorStateError.

        Waits for another thread's running request, and closes this thread's own open stream. Step costs that
        the bundle stores are written again if requests have corrected one by more than 5%.
        """
        self._lock.close(self._close)

    def _close(self) -> None:
        kept, self._kept = self._kept, None
        try:
            if kept is not None and self._costs is not None and self._greedy_costs is not None:
                now = self._greedy_costs.current
                pairs = zip(now.relative, self._costs.relative, strict=True)
                if any(max(new / old, old / new) > _MOVED for new, old in pairs):
                    save_step_costs(*kept, now)
        finally:
            self._backend.close()

    def __enter__(self) -> Generator:
        self._lock.require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(bundle: str | os.PathLike[str] | Bundle, verify_files: bool) -> Bundle:
    if isinstance(bundle, Bundle):
        if verify_files:
            bundle.verify_files()
        return bundle
    if isinstance(bundle, str | os.PathLike):
        return Bundle.open(bundle, verify_files=verify_files)
    raise BundleError(
        "this isn't a bundle",
        found=type(bundle).__name__,
        expected="the path of a bundle's folder, or a dflash_rt.Bundle",
        remedy="pass the folder that `dflash-export build` wrote",
    )


def _step_costs(bundle: Bundle, key: CostKey | None, backend: Backend, limits: ModelLimits) -> StepCosts:
    """Costs that ``bundle`` stores, or else measured and stored there; without a key measured only."""
    if key is None:
        return measure_step_costs(backend, limits)
    costs = load_step_costs(bundle, key, limits.num_draft_tokens + 1)
    if costs is None:
        costs = measure_step_costs(backend, limits)
        save_step_costs(bundle, key, costs)
    return costs


def _backend(
    bundle: Bundle, backend: str | Backend, threads: int | None, options: Mapping[str, Any] | None
) -> Backend:
    if threads is not None:
        check_count("threads", threads)
    if isinstance(backend, str):
        return create_backend(backend, bundle, threads=threads, options=options)
    for name, value in (("threads", threads), ("backend_options", options or None)):
        if value is not None:
            raise RequestError(
                f"{name} has no effect on a backend that is made already",
                found=f"{name}={value} and a backend object",
                expected="one of the two",
                remedy="set it where the backend is made",
            )
    if not isinstance(backend, Backend):
        raise BackendError(
            "this isn't a backend",
            found=type(backend).__name__,
            expected="a backend's name, or an object of a class made from dflash_rt.backends.base.Backend",
            remedy='pass backend="onnxruntime", or leave it out',
        )
    return backend
