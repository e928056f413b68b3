"""What ``dflash-export inspect`` shows: a bundle's models, graphs, files and origin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dflash_export.progress import SILENT, Progress
from dflash_rt import Bundle, SamplingParams
from dflash_rt.bundle.engine_match import built_for, bundle_differences
from dflash_rt.bundle.engine_sets import EngineSet, engine_folders, read_engines
from dflash_rt.bundle.folder import hash_file
from dflash_rt.bundle.manifest import (
    ENGINES_FOLDER,
    GraphSpec,
    QuantizationInfo,
    SamplingDefaults,
    SourceInfo,
    TensorSpec,
)
from dflash_rt.bundle.read import manifest_json
from dflash_rt.errors import EngineError

__all__ = ["EngineStatus", "FileStatus", "Inspection", "describe_quantization", "inspect_bundle"]

FileStatus: TypeAlias = Literal["ok", "changed", "not checked"]


@dataclass(frozen=True)
class Inspection:
    """A bundle, and the state of each of its files.

    ``unlisted`` are files in the folder that the manifest doesn't name: harmless, and never read.
    ``engines`` are its engine sets.
    """

    bundle: Bundle
    files: Mapping[str, FileStatus]
    unlisted: tuple[str, ...]
    engines: tuple[EngineStatus, ...] = ()

    @property
    def changed(self) -> tuple[str, ...]:
        """Files whose SHA-256 isn't the recorded one, engines with their folder."""
        own = [name for name, status in self.files.items() if status == "changed"]
        return (*own, *(f"{ENGINES_FOLDER}/{s.folder}/{name}" for s in self.engines for name in s.changed))

    def to_dict(self) -> dict[str, Any]:
        """The whole manifest and what was found, as JSON values."""
        return {
            "bundle": str(self.bundle.root),
            "bytes": self.bundle.total_bytes,
            "files": dict(self.files),
            "unlisted": list(self.unlisted),
            "engines": [engines.to_dict() for engines in self.engines],
            "manifest": json.loads(manifest_json(self.bundle.manifest)),
        }

    def table(self) -> str:
        """Text for people."""
        parts = [self._summary(), self._graphs(), self._files(), self._origin()]
        if self.engines:
            parts.append("engines\n" + _aligned([item.row() for item in self.engines], indent="  "))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        manifest = self.bundle.manifest
        target, drafter, defaults = manifest.target, manifest.drafter, manifest.generation
        limits = manifest.limits
        tokenizer = manifest.tokenizer
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        text = "token ids only" if tokenizer is None else "text, chats" if has_template else "text"
        window = "" if drafter.sliding_window is None else f", window {drafter.sliding_window}"
        if drafter.vocab_size != target.vocab_size:
            window += f", vocabulary {drafter.vocab_size}"
        tied = ", tied" if target.tie_word_embeddings else ""
        layers = ", ".join(map(str, drafter.feature_layers))
        template = "".join(
            f", chat template with {key}={json.dumps(value)}"
            for key, value in defaults.chat_template_kwargs.items()
        )
        rows = [
            ("bundle", f"{manifest.name}, {manifest.precision}, {_bytes(self.bundle.total_bytes)}"),
            *(("quantised", line) for line in describe_quantization(manifest.quantization)),
            ("folder", str(self.bundle.root)),
            ("target", f"{target.source.id} ({target.model_type})"),
            ("", f"{target.num_layers} layers of {target.hidden_size}, vocabulary {target.vocab_size}{tied}"),
            ("drafter", f"{drafter.source.id} ({drafter.kind})"),
            ("", f"{drafter.num_layers} layers, block of {drafter.block_size}{window}, on layers {layers}"),
            ("limits", f"{limits.max_seq_len} tokens, prefill in chunks of {limits.prefill_chunk}"),
            ("takes", text),
            ("defaults", f"num_draft_tokens {defaults.num_draft_tokens}{template}"),
            ("sampling", _sampling(defaults.sampling)),
            ("stop tokens", ", ".join(map(str, defaults.stop_token_ids)) or "none"),
        ]
        return _aligned(rows)

    def _graphs(self) -> str:
        return "\n".join(
            f"graph {name}  {graph.path}\n{_tensors(graph)}"
            for name, graph in self.bundle.manifest.graphs.items()
        )

    def _files(self) -> str:
        records = self.bundle.manifest.files
        rows: list[tuple[str, ...]] = [
            (name, f"{_bytes(records[name].size):>10}", records[name].sha256[:16], status)
            for name, status in self.files.items()
        ]
        rows += [(name, f"{'':>10}", " " * 16, "not part of the bundle") for name in self.unlisted]
        return "files (sha256 begins)\n" + _aligned(rows, indent="  ")

    def _origin(self) -> str:
        manifest = self.bundle.manifest
        made = manifest.provenance
        rows = [
            ("built", f"{made.created} by {made.tool}"),
            ("target from", _source(manifest.target.source)),
            ("drafter from", _source(manifest.drafter.source)),
            ("packages", ", ".join(f"{name} {version}" for name, version in made.packages.items())),
            ("options", ", ".join(f"{name}={value}" for name, value in made.options.items())),
        ]
        return _aligned(rows)


def describe_quantization(quantization: QuantizationInfo | None) -> list[str]:
    """Lines on how a target is stored and what that cost; none for one that isn't quantised."""
    if quantization is None:
        return []
    q, cost = quantization, quantization.cost
    lines = [f"{_how(q)}, {q.method}: {_bytes(q.bytes_before)} became {_bytes(q.bytes)}"]
    if q.calibration is not None:
        made = q.calibration
        lines.append(f"calibrated on {made.tokens} tokens of its own answers to {made.prompts} prompts")
    if cost is None:
        return [*lines, "what that cost wasn't measured"]
    agreement = (
        f"over {cost.tokens} tokens of the target's own text: best token the same in"
        f" {cost.top1_agreement:.1%}, KL divergence {cost.kl_divergence:.4f} nats"
    )
    steps = "tokens a drafted step weren't measured"
    if cost.tokens_per_step is not None and cost.tokens_per_step_before is not None:
        steps = f"tokens a drafted step: {cost.tokens_per_step_before:.2f} became {cost.tokens_per_step:.2f}"
    return [*lines, agreement, steps]


def _how(q: QuantizationInfo) -> str:
    """Types of weights and activations, and what else is quantised."""
    blocks = "a scale for each output" if q.block_size is None else f"blocks of {q.block_size}"
    parts = [f"{q.weights} in {blocks}" if q.block_size else f"{q.weights} with {blocks}"]
    parts += [] if q.activations is None else [f"activations {q.activations}"]
    parts += [] if q.head is None else [f"head {q.head}"]
    parts += [] if q.drafter is None else [f"drafter {q.drafter}"]
    return ", ".join(parts)


def inspect_bundle(bundle: Bundle, *, verify_files: bool = True, progress: Progress = SILENT) -> Inspection:
    """Look at a bundle; with ``verify_files`` every file is read and its SHA-256 compared.

    Engine sets are read likewise.

    Raises :class:`~dflash_rt.errors.IntegrityError` when a file can't be read, or when a graph, unchanged,
    takes weights from a file that isn't listed.
    """
    recorded = bundle.manifest.files
    states: dict[str, FileStatus] = dict.fromkeys(recorded, "not checked")
    if verify_files:
        with progress.stage("hashing files", total=bundle.total_bytes) as stage:
            for name, record in recorded.items():
                found = hash_file(bundle.root / name, name=name, progress=lambda _, size: stage.advance(size))
                states[name] = "ok" if found == record else "changed"
        if "changed" not in states.values():  # of other graphs than the recorded ones it would say little
            bundle.check_external_data()
    engines = [_inspect_engines(bundle, folder, verify_files, progress) for folder in engine_folders(bundle)]
    return Inspection(bundle, states, bundle.unlisted_files(), tuple(engines))


def _tensors(graph: GraphSpec) -> str:
    """One line for each tensor. Caches, which are many and alike, share a line."""
    kept = set(graph.aliases.values())
    lines = [f"  in   {_tensor(tensor)}" for tensor in graph.inputs if tensor.name not in kept]
    lines += [f"  out  {_tensor(tensor)}" for tensor in graph.outputs if tensor.name not in graph.aliases]
    if caches := [tensor for tensor in graph.inputs if tensor.name in kept]:
        shapes = sorted({f"{tensor.dtype} {_shape(tensor)}" for tensor in caches})
        lines.append(f"  in place  {len(caches)} caches {' / '.join(shapes)}")
    return "\n".join(lines)


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} {_shape(tensor)}"


def _shape(tensor: TensorSpec) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def _source(source: SourceInfo) -> str:
    revision = "" if source.revision is None else f" at {source.revision}"
    return f"{source.kind} {source.id}{revision}, {len(source.files)} files"


def _sampling(defaults: SamplingDefaults) -> str:
    """What differs from plain greedy decoding."""
    greedy = asdict(SamplingParams())
    changes = [f"{name} {value:g}" for name, value in asdict(defaults).items() if value != greedy[name]]
    return ", ".join(["greedy"] * (defaults.temperature == 0) + changes)


def _bytes(size: int) -> str:
    """A size in decimal units, as disks and downloads give it."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _aligned(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Columns of equal width; all rows have the same number of cells."""
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True)]
    return "\n".join((indent + "  ".join(cells)).rstrip() for cells in zip(*columns, strict=True))


@dataclass(frozen=True)
class EngineStatus:
    """One engine set, and what keeps it from serving its bundle.

    ``engines`` is None if the set's record can't be read. ``problems`` are the same on every machine: a
    damaged set, or one of another bundle's graphs. ``changed`` are engines with another SHA-256 than the
    recorded one.
    """

    folder: str
    engines: EngineSet | None
    problems: tuple[str, ...]
    changed: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The record's main facts; none if it can't be read."""
        if self.engines is None:
            return {}
        build, limits = self.engines.build, self.engines.limits
        return {
            "backend": build.backend,
            "backend_version": build.backend_version,
            "built_for": built_for(build),
            "precision": build.precision,
            "max_seq_len": limits.max_seq_len,
            "max_batch": limits.max_batch,
            "bytes": sum(file.size for file in self.engines.files.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        states = {"problems": list(self.problems), "changed": list(self.changed)}
        return {"folder": self.folder, **self.facts(), **states}

    def row(self) -> tuple[str, str, str]:
        """Folder, facts and state, for people."""
        problems = [*self.problems, *(f"{name} changed" for name in self.changed)]
        text = ""
        if facts := self.facts():
            text = (
                "{backend} {backend_version}, {built_for}, {precision}, "
                "{max_seq_len} tokens, batch {max_batch}, {megabytes:.1f} MB"
            ).format(**facts, megabytes=facts["bytes"] / 1e6)
        return self.folder, text, "; ".join(problems) or "fits this bundle"


def _inspect_engines(bundle: Bundle, folder: Path, verify_files: bool, progress: Progress) -> EngineStatus:
    try:
        engines = read_engines(folder)
    except EngineError as error:
        problem = error.problem
        return EngineStatus(folder.name, None, (f"{problem.what}: {problem.found}",))
    problems = tuple(map(str, bundle_differences(engines, bundle)))
    changed = []
    if verify_files:
        total = sum(file.size for file in engines.files.values())
        with progress.stage(f"hashing {folder.name}", total=total) as stage:
            for file in engines.files.values():
                path = folder / file.name
                found = hash_file(path, name=file.name, progress=lambda _, size: stage.advance(size))
                if found.sha256 != file.sha256:
                    changed.append(file.name)
    return EngineStatus(folder.name, engines, problems, tuple(changed))
