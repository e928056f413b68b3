"""PyTorch as the yardstick: the checkpoints behind a bundle, run by transformers and by PyPI ``dflash``.

Nothing here comes from the exporter's own tracing: the models are loaded by ``from_pretrained``, from files
whose SHA-256 are those that the bundle records, and run by Hugging Face ``generate`` and by the reference's
own loop.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from dflash_export.drafters.read import load_drafter_config
from dflash_export.errors import VerifyError
from dflash_export.sources.resolve import Source, resolve_drafter, resolve_target
from dflash_rt.bundle.manifest import SourceInfo

__all__ = [
    "Greedy",
    "ReferenceRun",
    "TeacherForced",
    "find_source",
    "generate_greedy",
    "generate_reference",
    "load_drafter",
    "load_target",
    "reference_version",
    "teacher_forced",
]

FloatArray = npt.NDArray[np.float32]
Role = Literal["target", "drafter"]


@dataclass(frozen=True, eq=False)
class Greedy:
    """What ``generate`` gave. ``logits`` float32 ``[rows, vocab]``: what its first tokens came from."""

    token_ids: tuple[int, ...]
    logits: FloatArray


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """One pass over a whole sequence, without a cache.

    Attributes:
        logits: float32 ``[new_tokens, vocab]``; row k is what new token k is chosen from.
        features: float32 ``[rows, taps, hidden]`` of every row fed in: prompt and new tokens but the last.
    """

    logits: FloatArray
    features: FloatArray


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference's loop gave. ``tokens_by_step`` counts the bonus; the last step is cut at the end.

    ``prefill_seconds`` runs up to the first new token and ``decode_seconds`` from there, by the loop's own
    clock.
    """

    token_ids: tuple[int, ...]
    tokens_by_step: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float


def find_source(role: Role, info: SourceInfo, spec: str | os.PathLike[str] | None = None) -> Source:
    """The checkpoint that a bundle was built from, with every recorded file compared by SHA-256.

    ``spec`` is a path or hub id as :func:`dflash_export.build` takes it; ``None`` is the recorded hub id,
    at its recorded revision. Reads every byte of the checkpoint.

    Raises:
        VerifyError: no ``spec`` and no recorded hub id, or other files than those the bundle was built from.
        SourceError, CheckpointError: it can't be found or read.
    """
    if spec is None and info.kind != "hub":
        raise VerifyError(
            f"the bundle doesn't record where its {role} lies",
            found=f"a local {info.kind}: {info.id}",
            expected=f"the path of the {role} that it was built from",
            remedy=f"name it with --{role} (or {role}=… in Python), or name the recipe with --recipe",
        )
    recorded_hub_id = info.kind == "hub" and (spec is None or os.fspath(spec) == info.id)
    revision = info.revision if recorded_hub_id and not Path(info.id).exists() else None
    resolve = resolve_target if role == "target" else resolve_drafter
    source = resolve(info.id if spec is None else spec, revision=revision)
    _require_recorded_files(role, info, source)
    return source


def _require_recorded_files(role: Role, info: SourceInfo, source: Source) -> None:
    found = source.files()
    if info.kind == source.kind == "gguf":  # one file, whatever it is called by now
        found = dict(zip(info.files, found.values(), strict=False))
    problems = [
        f"{name}: "
        + ("missing" if name not in found else f"sha256 {found[name].sha256[:16]}… was {record.sha256[:16]}…")
        for name, record in info.files.items()
        if found.get(name) != record
    ]
    if problems:
        raise VerifyError(
            f"this isn't the {role} that the bundle was built from: {source.id}",
            found="; ".join(problems),
            expected=f"the recorded files of {info.kind} {info.id}"
            + (f" at revision {info.revision}" if info.revision else ""),
            remedy=f"name the right {role}, or build the bundle again from this one",
        )


def load_target(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    """The target as transformers loads it: a causal LM in eval mode, on the CPU.

    Its own generation defaults (some repositories ship a repetition penalty) are dropped: greedy is greedy.
    Raises VerifyError when transformers can't load it whole.
    """
    options: dict[str, Any] = {"use_safetensors": True}
    if source.kind == "gguf":
        options = {"gguf_file": source.path.name}
    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers raises plain built-in types of many kinds
        raise _cannot_load("target", source, f"{type(error).__name__}: {error}") from error
    model, info = loaded
    # transformers would fill these with random numbers and only warn.
    unusable = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if unusable:
        raise _cannot_load("target", source, f"missing or misshapen: {', '.join(sorted(unusable))}")
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model.eval()


def load_drafter(source: Source) -> Any:
    """The drafter as PyPI ``dflash`` loads it, in float32.

    Raises:
        VerifyError: it can't load it.
        UnsupportedModelError, CheckpointError: this is no drafter.
    """
    kind = load_drafter_config(source).kind
    if kind.reference_class is None:
        raise _cannot_load("drafter", source, f"{kind.format}, which PyPI dflash doesn't read")
    try:
        model = getattr(importlib.import_module("dflash.model"), kind.reference_class)
        with _quiet_transformers():
            return model.from_pretrained(
                source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ).eval()
    except Exception as error:  # as above; and the reference reads configs without checking them
        raise _cannot_load("drafter", source, f"{type(error).__name__}: {error}") from error


def reference_version() -> str | None:
    """The installed version of PyPI ``dflash``; None when it isn't installed."""
    try:
        version = importlib.metadata.version("dflash")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if importlib.util.find_spec("dflash") is not None else None


def generate_greedy(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    record_rows: int = 0,
) -> Greedy:
    """Hugging Face ``generate(do_sample=False)``, which feeds one token at a time to a cache.

    The attention mask is all ones: left out, transformers would take prompt tokens that equal the pad id for
    padding. ``record_rows`` is how many tokens' logits to keep.
    """
    stops = sorted(stop_token_ids)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    input_ids = torch.tensor([list(prompt)], device=model.device)
    kept: list[FloatArray] = []

    def record(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(kept) < record_rows:
            kept.append(scores[0].float().cpu().numpy().copy())
        return scores

    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        logits_processor=[record] if record_rows else None,
    )
    vocab = model.config.vocab_size
    logits = np.stack(kept) if kept else np.zeros((0, vocab), np.float32)
    return Greedy(tuple(output[0, input_ids.shape[1] :].tolist()), logits)


def teacher_forced(
    model: Any, prompt: Sequence[int], new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
) -> TeacherForced:
    """Feed prompt and new tokens in one pass: what PyTorch thinks of every token of a given sequence.

    Holds ``new_tokens * vocab`` float32 logits. Features are ``hidden_states[layer + 1]`` of transformers, as
    the reference taps them.
    """
    fed = [*prompt, *new_tokens[:-1]]
    input_ids = torch.tensor([fed], device=model.device)
    with torch.inference_mode():
        output = model(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            output_hidden_states=bool(feature_layers),
            logits_to_keep=torch.arange(len(prompt) - 1, len(fed), device=model.device),
        )
        taps = [output.hidden_states[layer + 1][0] for layer in feature_layers]
        features = torch.stack(taps, dim=1) if taps else torch.zeros(len(fed), 0, 0)
        return TeacherForced(output.logits[0].float().cpu().numpy(), features.float().cpu().numpy())


def generate_reference(
    drafter: Any,
    target: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    block_size: int | None = None,
) -> ReferenceRun:
    """The loop of PyPI ``dflash`` (``dflash_generate``), greedy. ``block_size=None``: the drafter's.

    It clips the last blocks to the tokens that are still wanted, which changes what is drafted in them.
    """
    module = importlib.import_module("dflash.model")
    input_ids = torch.tensor([list(prompt)], device=target.device)
    on_cpu = target.device.type == "cpu"
    with _clock_without_cuda(module) if on_cpu else contextlib.nullcontext():
        found = module.dflash_generate(
            drafter,
            target,
            input_ids,
            max_new_tokens,
            sorted(stop_token_ids) or None,
            block_size=block_size,
            return_stats=True,
        )
    new = found.output_ids[0, input_ids.shape[1] :].tolist()
    return ReferenceRun(
        tuple(new),
        tuple(found.acceptance_lengths),
        prefill_seconds=found.time_to_first_token,
        decode_seconds=found.time_per_output_token * found.num_output_tokens,
    )


@contextlib.contextmanager
def _clock_without_cuda(module: Any) -> Iterator[None]:
    # Asked for statistics, it synchronises CUDA, which fails where there is none.
    before = module._cuda_time
    module._cuda_time = time.perf_counter
    try:
        yield
    finally:
        module._cuda_time = before


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no warnings of its own: what matters of them is raised here as an error."""
    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Its setting for bars doesn't reach the one of its GGUF reader.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _cannot_load(role: Role, source: Source, found: str) -> VerifyError:
    return VerifyError(
        f"PyTorch can't load the {role} {source.id}",
        found=" ".join(found.split())[:500],
        expected=f"transformers {transformers.__version__} loads what the bundle was built from",
        remedy="install the package versions that manifest.json records under provenance.packages",
    )
