"""Proof of parity: a bundle's tokens against PyTorch's, with every difference explained.

docs/guide/verify.md describes the method for a sceptical reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dflash_export.drafters.read import KINDS
from dflash_export.errors import SourceError
from dflash_export.graphs.graph import PRECISIONS, torch_dtype
from dflash_export.parity.assemble import assemble
from dflash_export.parity.drafting import run_reference
from dflash_export.parity.measure import ErrorCollectors, Measurements, Run, drafted_name, measure
from dflash_export.parity.prompts import PromptInput, default_prompts, encode_prompts
from dflash_export.parity.replay import Replay
from dflash_export.parity.report import ReferenceDrafting, VerifyReport
from dflash_export.parity.report_file import require_writable
from dflash_export.parity.report_file import write_report as write_report_file
from dflash_export.progress import SILENT, Progress
from dflash_export.quantize.dequantized import put_dequantized
from dflash_export.reference import find_source, load_target, reference_version
from dflash_export.sources.resolve import Source
from dflash_rt import Bundle, Generator, SamplingParams
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.bundle.manifest import Manifest
from dflash_rt.request import check_count
from dflash_rt.text.prompts import Prompt

__all__ = ["REPORT_NAME", "verify"]

REPORT_NAME = "verify.json"


def verify(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 128,
    target: str | os.PathLike[str] | None = None,
    drafter: str | os.PathLike[str] | None = None,
    reference: bool = True,
    threads: int | None = None,
    write_report: bool = True,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare drafted, plain and PyTorch's greedy tokens of a bundle, and sort every difference.

    PyTorch runs in fp32 whatever the bundle's precision. Of a quantised bundle it holds the dequantised
    weights, and the bundle runs with float activations (docs/guide/quantize.md): graphs and loop are judged,
    not quantisation. Loads the target in fp32 once, and for a 16-bit
    bundle once more in 16 bits.

    Args:
        bundle: a bundle's folder, or an open bundle. All of its files are hashed.
        prompts: texts, chats or lists of token ids; ``None`` for built-in ones.
        max_new_tokens: tokens for each prompt at most; the bundle's stop tokens end one earlier.
        target: path or hub id of the target; needed unless the bundle records a hub id.
        drafter: the same for the drafter, which only the reference's loop needs.
        reference: also run the loop of PyPI ``dflash``, if it is installed and the drafter is at hand.
        threads: CPU threads of ONNX Runtime; ``None`` for its default.
        write_report: write ``reports/verify.json`` into the bundle.
        progress: where stages are reported; default: nowhere.

    Raises:
        VerifyError: no prompts, sources that aren't those the bundle records, or PyTorch can't load them.
        OutputError: the report can't be written.
        BundleError, RequestError, SourceError, BackendError: as elsewhere. A bf16 bundle can't run on a CPU.
    """
    progress = progress or SILENT
    check_count("max_new_tokens", max_new_tokens)
    with progress.stage("checking files"):
        opened = _open_checked(bundle)
        manifest = opened.manifest
        source = find_source("target", manifest.target.source, target)
        drafter_source, skipped = _find_drafter(manifest, drafter, wanted=reference)
    if write_report:
        require_writable(opened)
    widths = sorted({1, manifest.generation.num_draft_tokens + 1, manifest.drafter.block_size}, reverse=True)
    asked, ours, text_of = _run_ours(opened, widths, prompts, max_new_tokens, threads, progress)

    with progress.stage("loading PyTorch"):
        model = _load_target(source, opened)
        sixteen_bit = None
        if manifest.precision != "fp32":
            sixteen_bit = _load_target(source, opened, torch_dtype(PRECISIONS[manifest.precision]))
    collectors = ErrorCollectors(widths, manifest.drafter.feature_layers)
    replays = Replay.all_forms(opened, threads=threads)
    measurements: list[Measurements] = []
    with progress.stage("comparing with PyTorch", total=len(asked)) as stage:
        for prompt, runs in zip(asked, ours, strict=True):
            measurements.append(
                measure(
                    prompt,
                    runs,
                    model=model,
                    sixteen_bit_model=sixteen_bit,
                    replays=replays,
                    feature_layers=manifest.drafter.feature_layers,
                    stop_token_ids=manifest.generation.stop_token_ids,
                    max_new_tokens=max_new_tokens,
                    collectors=collectors,
                )
            )
            stage.advance()
    del replays, sixteen_bit
    if drafter_source is None:
        found = ReferenceDrafting(skipped)
    else:
        found = run_reference(model, drafter_source, manifest, measurements, max_new_tokens, progress)

    mixture = getattr(model.config, "num_experts", None) is not None
    report = assemble(
        opened, source, max_new_tokens, measurements, collectors, found, text_of, threads, mixture=mixture
    )
    if write_report:
        text = json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
        write_report_file(opened, REPORT_NAME, text + "\n")
    return report


def _open_checked(bundle: str | os.PathLike[str] | Bundle) -> Bundle:
    if not isinstance(bundle, Bundle):
        return Bundle.open(bundle, verify_files=True)
    bundle.verify_files()
    return bundle


def _find_drafter(
    manifest: Manifest, drafter: str | os.PathLike[str] | None, *, wanted: bool
) -> tuple[Source | None, str | None]:
    """The drafter's checkpoint, or why the reference's loop is skipped. One that is named has to be right."""
    info = manifest.drafter.source
    named = None if drafter is None else find_source("drafter", info, drafter)
    (kind,) = (kind for kind in KINDS if kind.name == manifest.drafter.kind)
    unread = kind.reference_class is None
    if unread or (named is None and not wanted):
        return None, f"PyPI dflash doesn't read {kind.format}" if unread else "not asked for"
    if named is not None:
        return named, None
    if reference_version() is None:
        return None, "PyPI dflash is not installed"
    if info.kind != "hub":
        return None, f"the bundle doesn't record where {info.id} lies; name it with --drafter"
    try:
        return find_source("drafter", info), None
    except SourceError as error:
        return None, f"{error.problem.what}: {error.problem.found}"


def _run_ours(
    bundle: Bundle,
    widths: Sequence[int],
    prompts: Sequence[Prompt] | None,
    max_new_tokens: int,
    threads: int | None,
    progress: Progress,
) -> tuple[list[PromptInput], list[list[Run]], Callable[[int], str]]:
    """Our own tokens through the public generator, one request after another on the same caches."""
    asked: list[PromptInput] = []
    ours: list[list[Run]] = []
    for width in (width for width in widths if width > 1):
        with _generator(bundle, width, threads) as generator:
            if not asked:
                asked = _prompts(generator, bundle.manifest, prompts, max_new_tokens)
                ours = [[] for _ in asked]
            last = width == min(width for width in widths if width > 1)
            modes = (width, 1) if last else (width,)
            with progress.stage(f"decoding, {drafted_name(width)}", total=len(asked) * len(modes)) as stage:
                for prompt, runs in zip(asked, ours, strict=True):
                    for mode in modes:
                        result = generator.generate(
                            list(prompt.token_ids),
                            max_new_tokens=max_new_tokens,
                            sampling=SamplingParams(),  # greedy, whatever the bundle's defaults are
                            speculative=mode > 1,
                        )
                        runs.append(Run.ours(result, mode))
                        stage.advance()
    return asked, ours, _token_text(bundle)


def _generator(bundle: Bundle, width: int, threads: int | None) -> Generator:
    if bundle.manifest.quantization is None:
        return Generator(bundle, num_draft_tokens=width - 1, threads=threads)
    if threads is not None:
        check_count("threads", threads)
    exact = OnnxRuntimeBackend(bundle, threads=threads, integer_activations=False)
    return Generator(bundle, exact, num_draft_tokens=width - 1)


def _load_target(source: Source, bundle: Bundle, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint, with the weights that the bundle has of it."""
    model, quantization = load_target(source, dtype), bundle.manifest.quantization
    if quantization is None:
        return model
    # Once is enough; and 16 bits would be quantised to something else.
    return put_dequantized(model, bundle.root, quantization, check=dtype == torch.float32)


def _prompts(
    generator: Generator, manifest: Manifest, prompts: Sequence[Prompt] | None, max_new_tokens: int
) -> list[PromptInput]:
    if prompts is None:
        return default_prompts(generator, manifest, max_new_tokens)
    return encode_prompts(generator, prompts, max_new_tokens)


def _token_text(bundle: Bundle) -> Callable[[int], str]:
    """Text of a single token, special ones written out; "" where there is no tokenizer."""
    path = bundle.tokenizer_path()
    if path is None:
        return lambda _: ""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))
