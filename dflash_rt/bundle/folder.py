"""A bundle: a folder with ``manifest.json`` and the files that it lists."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dflash_rt.bundle.manifest import (
    ENGINES_FOLDER,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    FileRecord,
    Manifest,
    is_file_path,
)
from dflash_rt.bundle.onnx_scan import external_locations
from dflash_rt.bundle.read import MAX_MANIFEST_BYTES, read_manifest
from dflash_rt.errors import BundleError, IntegrityError, ManifestError

__all__ = ["Bundle", "Progress", "hash_file"]

# Called with a file's name inside the bundle and the number of bytes hashed since the last call.
Progress = Callable[[str, int], None]

_CHUNK_BYTES = 2**20
_REBUILD = "copy the bundle again, or build it again with `dflash-export build --force`"
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle folder. Made by :meth:`open`; ``root`` is absolute, with symlinks resolved."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify_files: bool = False, progress: Progress | None = None
    ) -> Bundle:
        """Read the manifest and check that every file it lists is there, inside the folder, with its size.

        ``verify_files`` also compares every SHA-256, which reads every byte, and checks that graphs take
        weights from listed files only; ``progress`` is called for the bytes read.

        Raises:
            BundleError: ``path`` is missing, isn't a folder, or isn't a complete bundle.
            ManifestError: the manifest is malformed, of another version or hostile.
            IntegrityError: files are missing, outside the folder, truncated or changed, or with
                ``verify_files`` a graph names a file that isn't listed; all are named.
        """
        root = _resolve_folder(Path(path))
        bundle = cls(root, read_manifest(_read_manifest(root)))
        problems = [_file_problem(root, name, record) for name, record in bundle.manifest.files.items()]
        _raise_if_any(root, [problem for problem in problems if problem is not None])
        if verify_files:
            bundle.verify_files(progress)
        return bundle

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files together."""
        return sum(record.size for record in self.manifest.files.values())

    def path_of(self, name: str) -> Path:
        """Absolute path of a listed file. Raises BundleError for a name that the manifest doesn't list."""
        return self.root / _known("file", name, self.manifest.files)

    def graph_path(self, graph: str) -> Path:
        """Absolute path of a graph's ONNX file. Raises BundleError if the bundle doesn't have that graph."""
        return self.path_of(self.manifest.graphs[_known("graph", graph, self.manifest.graphs)].path)

    def fused_path(self, graph: str, *, on_gpu: bool = False) -> Path | None:
        """Absolute path of a graph's fused form; None where it has none. Raises BundleError as graph_path.

        Like ONNX Runtime's kernels, a form in fp32 is for CPUs and one in 16 bits for GPUs (``on_gpu``).
        """
        self.graph_path(graph)
        fused = self.manifest.graphs[graph].fused
        if fused is None or on_gpu == (self.manifest.precision == "fp32"):
            return None
        return self.path_of(fused)

    def tokenizer_path(self) -> Path | None:
        """Absolute path of tokenizer.json; None for a bundle that takes token ids only."""
        spec = self.manifest.tokenizer
        return None if spec is None else self.path_of(spec.path)

    def read_chat_template(self) -> str | None:
        """The chat template's source, or None. Raises IntegrityError if the file isn't UTF-8 text."""
        spec = self.manifest.tokenizer
        if spec is None or spec.chat_template is None:
            return None
        try:
            return self.path_of(spec.chat_template).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"the chat template {spec.chat_template} can't be read",
                found=error,
                expected="UTF-8 text",
                remedy=_REBUILD,
            ) from error

    def verify_files(self, progress: Progress | None = None) -> None:
        """Hash every listed file, and check which files the graphs take weights from.

        Raises IntegrityError naming all files that differ from the manifest, or else all unlisted files that
        a graph takes weights from.
        """
        problems = []
        for name, record in self.manifest.files.items():
            problem = _file_problem(self.root, name, record)
            if problem is None:
                found = hash_file(self.root / name, name=name, progress=progress)
                if found != record:
                    problem = f"{name}: found sha256 {found.sha256}, expected {record.sha256}"
            if problem is not None:
                problems.append(problem)
        _raise_if_any(self.root, problems)
        self.check_external_data()

    def check_external_data(self) -> None:
        """Raise IntegrityError if a graph takes weights from a file that the manifest doesn't list."""
        specs = self.manifest.graphs.values()
        graphs = [path for spec in specs for path in (spec.path, spec.fused) if path is not None]
        problems = [
            f"{graph}: takes weights from {location!r}, which {reason}"
            for graph in graphs
            for location in external_locations(self.path_of(graph))
            if (reason := self._wrong_location(graph, location)) is not None
        ]
        _raise_if_any(self.root, problems)

    def _wrong_location(self, graph: str, location: str) -> str | None:
        """Why a graph can't have weights at ``location``, relative to its own folder; None if it can."""
        if not is_file_path(location):
            return "isn't a path inside the bundle"
        name = (PurePosixPath(graph).parent / location).as_posix()
        return None if name in self.manifest.files else f"{MANIFEST_NAME} doesn't list"

    def unlisted_files(self) -> tuple[str, ...]:
        """Names of files in the folder that the manifest doesn't list, sorted.

        manifest.json, reports/ and engines/ don't count. Linked folders are named and not entered.
        """
        known = {MANIFEST_NAME, *self.manifest.files}
        found: list[str] = []
        for folder, folders, names in os.walk(self.root):
            here = Path(folder).relative_to(self.root)
            if here == Path():
                folders[:] = [name for name in folders if name not in (ENGINES_FOLDER, REPORTS_FOLDER)]
            links = [name for name in folders if (self.root / here / name).is_symlink()]
            found.extend((here / name).as_posix() for name in [*names, *links])
        listed_parents = {parent.as_posix() for name in known for parent in Path(name).parents}
        return tuple(sorted(name for name in found if name not in known and name not in listed_parents))


def _known(kind: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        raise BundleError(
            f"the bundle has no {kind} {name!r}",
            found=", ".join(sorted(names)),
            expected=f"a {kind} that manifest.json lists",
            remedy=f"use a name from `bundle.manifest.{kind}s`",
        )
    return name


def hash_file(path: Path, *, name: str | None = None, progress: Progress | None = None) -> FileRecord:
    """Size in bytes and SHA-256 of a file, read in pieces of 1 MiB.

    ``progress`` is called with ``name``, by default the file's own. Raises IntegrityError if reading fails.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if progress is not None:
                    progress(path.name if name is None else name, len(chunk))
    except OSError as error:
        raise IntegrityError(
            f"{path} can't be read",
            found=error.strerror or error,
            expected="a readable file",
            remedy="check its permissions and the disk",
        ) from error
    return FileRecord(size, digest.hexdigest())


def _resolve_folder(path: Path) -> Path:
    """The absolute folder. Raises BundleError when there is none."""
    remedy = "give the folder that `dflash-export build -o` wrote"
    try:
        root = path.resolve(strict=True)
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a NUL in the path
        found = "nothing there" if isinstance(error, FileNotFoundError) else str(error)
        raise BundleError(f"no bundle at {path}", found=found, expected="a folder", remedy=remedy) from error
    if not is_folder:
        raise BundleError(f"no bundle at {path}", found="a file", expected="a folder", remedy=remedy)
    return root


def _read_manifest(root: Path) -> str:
    path = root / MANIFEST_NAME
    if not os.path.lexists(path):
        raise _no_manifest(root)
    problem = _file_problem(root, MANIFEST_NAME, None)
    if problem is not None:
        raise ManifestError(
            f"the manifest of {root} can't be used",
            found=problem,
            expected="a regular file in the folder",
            remedy=_REBUILD,
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                "manifest.json is too large",
                found=f"more than {MAX_MANIFEST_BYTES} bytes",
                expected=f"at most {MAX_MANIFEST_BYTES} bytes",
                remedy=_REBUILD,
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            "manifest.json can't be read", found=error, expected="UTF-8 text", remedy=_REBUILD
        ) from error


def _no_manifest(root: Path) -> BundleError:
    """The most helpful error for a folder without manifest.json."""
    if any(root.glob("*.onnx")):
        found = "graphs without a manifest: an export that didn't finish"
    elif (root / "config.json").exists():
        found = "a model checkpoint, which has to be exported first"
    else:
        found = "no manifest.json"
    return BundleError(
        f"{root} is not a bundle",
        found=found,
        expected="a folder with manifest.json",
        remedy="build one with `dflash-export build --target … --drafter … -o FOLDER`",
    )


def _file_problem(root: Path, name: str, record: FileRecord | None) -> str | None:
    """A problem of a listed file, found without reading it, or None. ``root`` is resolved already."""
    try:
        resolved = (root / name).resolve(strict=True)
        if not resolved.is_relative_to(root):
            return f"{name}: a link to {resolved}, which is outside the bundle"
        status = resolved.stat()
    except FileNotFoundError:
        return f"{name}: missing"
    except (OSError, RuntimeError) as error:
        return f"{name}: {error}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name}: not a regular file"
    if record is not None and status.st_size != record.size:
        return f"{name}: found {status.st_size} bytes, expected {record.size}"
    return None


def _raise_if_any(root: Path, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:_MAX_LISTED]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise IntegrityError(
        "\n  ".join([f"the bundle {root} isn't what its manifest says", *shown]),
        expected="every listed file, unchanged, inside the folder",
        remedy=_REBUILD,
    )
