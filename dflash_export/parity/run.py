"""Proof of parity: a bundle's tokens against PyTorch's, with every difference explained.

docs/guide/verify.md describes the method for a sceptical reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dflash_export.drafters.read import KINDS
from dflash_export.errors import SourceError
from dflash_export.graphs.graph import PRECISIONS, torch_dtype
from dflash_export.parity.drafting import drafting_at, run_reference
from dflash_export.parity.limits import make_limits
from dflash_export.parity.measure import ErrorCollectors, Measurements, Run, drafted_name, measure
from dflash_export.parity.prompts import PromptInput, encode_prompts
from dflash_export.parity.replay import Replay
from dflash_export.parity.report import ReferenceDrafting, VerifyReport
from dflash_export.parity.verdicts import classify_prompt, find_problems, find_warnings
from dflash_export.progress import SILENT, Progress
from dflash_export.quantize.dequantized import put_dequantized
from dflash_export.reference import find_source, load_target, reference_version
from dflash_export.sources.resolve import Source
from dflash_rt import Bundle, Generator, SamplingParams
from dflash_rt.backends.cpu.backend import OnnxRuntimeBackend
from dflash_rt.bundle.manifest import MANIFEST_NAME, REPORTS_FOLDER, Manifest
from dflash_rt.errors import OutputError
from dflash_rt.files import utc_now, write_atomically
from dflash_rt.machine import cpu_name
from dflash_rt.request import check_count
from dflash_rt.text.prompts import Prompt
from dflash_rt.version import __version__

__all__ = ["verify"]

_REPORT_NAME = "verify.json"
_PACKAGES = ("dflash", "numpy", "onnxruntime", "tokenizers", "torch", "transformers")


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
    not quantisation. Loads the target in fp32 once, and for a 16-bit bundle once more in 16 bits.

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
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        opened.verify_files()
        manifest = opened.manifest
        source = find_source("target", manifest.target.source, target)
        drafter_source, skipped = _find_drafter(manifest, drafter, wanted=reference)
    if write_report:
        with _reports_folder(opened) as folder, tempfile.TemporaryFile(dir=folder):
            pass  # a report can be written: found out before minutes of work, not after
    widths = sorted({1, manifest.generation.num_draft_tokens + 1, manifest.drafter.block_size}, reverse=True)
    asked, ours = _run_ours(opened, widths, prompts, max_new_tokens, threads, progress)

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
                    manifest=manifest,
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

    errors = {width: collector.result() for width, collector in collectors.by_width.items()}
    shapes = {width: collector.result() for width, collector in collectors.shapes.items()}
    repeated = collectors.repeated.result()
    noise = None if manifest.precision == "fp32" else collectors.sixteen_bit.result()
    limits = make_limits(
        errors=errors.values(),
        shapes=shapes.values(),
        repeated=repeated,
        noise=noise or repeated,
        precision=manifest.precision,
        mixture=getattr(model.config, "num_experts", None) is not None,
    )
    features = collectors.features.result()
    text_of = _token_text(opened)
    judged = tuple(classify_prompt(index, item, limits, text_of) for index, item in enumerate(measurements))
    report = VerifyReport(
        bundle={
            "name": manifest.name,
            "precision": manifest.precision,
            "quantization": None if manifest.quantization is None else manifest.quantization.weights,
            "manifest_sha256": hashlib.sha256((opened.root / MANIFEST_NAME).read_bytes()).hexdigest(),
        },
        target={"kind": source.kind, "id": source.id, "revision": source.revision},
        max_new_tokens=max_new_tokens,
        created=utc_now(),
        environment=_environment(threads),
        prompts=judged,
        logit_errors=errors,
        shape_errors=shapes,
        pytorch_repeated=repeated,
        pytorch_16_bit=noise,
        limits=limits,
        features=features,
        drafting=tuple(drafting_at(measurements, width) for width in errors if width > 1),
        reference=found,
        problems=find_problems(judged, errors, limits),
        warnings=tuple(find_warnings(features, found, manifest.precision)),
    )
    if write_report:
        text = json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
        with _reports_folder(opened) as folder:
            write_atomically(folder / _REPORT_NAME, text + "\n")
    return report


@contextlib.contextmanager
def _reports_folder(bundle: Bundle) -> Iterator[Path]:
    """The folder of reports, which is neither listed nor hashed. Raises OutputError."""
    folder = bundle.root / REPORTS_FOLDER
    try:
        # Never through a link: it may lead out of the bundle.
        if folder.is_symlink():
            raise OSError(f"{folder} is a link")
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise OutputError(
            f"can't write a report into {folder}",
            found=error.strerror or error,
            expected="a folder that may be written, with some room",
            remedy="mend the permissions or free disk space, or pass write_report=False (--no-report)",
        ) from error


def _environment(threads: int | None) -> dict[str, str | int | None]:
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "dflash-export": __version__,
        "python": platform.python_version(),
        **versions,
        "processor": cpu_name(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "onnxruntime_threads": threads,
    }


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
) -> tuple[list[PromptInput], list[list[Run]]]:
    """The bundle's tokens through the public generator, one request after another on the same caches.

    ``widths`` fall to 1, which is plain decoding.
    """
    asked: list[PromptInput] = []
    ours: list[list[Run]] = []
    for width, narrower in itertools.pairwise(widths):
        with _generator(bundle, width, threads) as generator:
            if not asked:
                asked = encode_prompts(generator, bundle.manifest, prompts, max_new_tokens)
                ours = [[] for _ in asked]
            modes = (width, 1) if narrower == 1 else (width,)
            with progress.stage(f"decoding, {drafted_name(width)}", total=len(asked) * len(modes)) as stage:
                for prompt, runs in zip(asked, ours, strict=True):
                    for mode in modes:
                        result = generator.generate(
                            list(prompt.token_ids),
                            max_new_tokens=max_new_tokens,
                            sampling=SamplingParams(),  # greedy, whatever the bundle's defaults are
                            speculative=mode > 1,
                        )
                        runs.append(Run.of(result, mode))
                        stage.advance()
    return asked, ours


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


def _token_text(bundle: Bundle) -> Callable[[int], str]:
    """Text of a single token, special ones written out; "" where there is no tokenizer."""
    path = bundle.tokenizer_path()
    if path is None:
        return lambda _: ""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))
