"""Reading safetensors one tensor at a time, with errors that say what is wrong with which file.

The header is parsed here so that sizes can be named, and checked once more by the ``safetensors`` library.
Data is read with plain file reads: mapped pages would count as memory of the export until the file is closed.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dflash_export.errors import CheckpointError
from dflash_export.sources.files import INDEX_FILE, cannot_read, damaged, index_map, is_file
from dflash_export.sources.weights import Weights, closed_error, missing_error

__all__ = ["SafetensorsWeights"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_EXPERT = re.compile(r"(?P<block>.+\.mlp\.experts)\.(?P<index>\d+)\.(?P<kind>gate|up|down)_proj\.weight")
# transformers recomputes these buffers and passes over them when an old checkpoint has them.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Entry:
    """Where one stored tensor lies: ``begin`` and ``nbytes`` in bytes from the start of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsWeights(Weights):
    """One ``model.safetensors``, or the shards of an index."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        self._open_files: dict[str, io.BufferedReader] | None = {}
        for file in files:
            for name, entry in _read_header(folder / file).items():
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {name} is stored twice",
                        found=f"in {self._entries[name].file} and in {file}",
                        expected="each tensor in one file",
                        remedy="download the checkpoint again",
                    )
                self._entries[name] = entry
        if is_file(folder / INDEX_FILE):
            _check_index(index_map(folder / INDEX_FILE), self._entries)
        self._stacks = _expert_stacks(self._entries)
        stacked = {part for parts in self._stacks.values() for part in parts}
        single = {n for n in self._entries if n not in stacked and not n.endswith(_IGNORED_SUFFIX)}
        self._names = sorted(single | set(self._stacks))

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stacks:
            return self._entry(name).shape
        parts = self._stacks[name]
        rows, columns = self._entries[parts[0]].shape
        matrices = 2 if name.endswith(".gate_up_proj") else 1
        return (len(parts) // matrices, matrices * rows, columns)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(self._stacks[name][0] if name in self._stacks else name).dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._stacks:
            return self._read(name)[start:stop].clone()
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows [{start}, {stop}) of {name} {list(entry.shape)}")
        row_bytes = entry.nbytes // max(entry.shape[0], 1)
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self._fill(out, entry, start * row_bytes)
        return out

    def close(self) -> None:
        for file in (self._open_files or {}).values():
            file.close()
        self._open_files = None

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._stacks:
            entry = self._entry(name)
            out = torch.empty(entry.shape, dtype=entry.dtype)
            self._fill(out, entry, 0)
            return out
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        pieces = out.view(len(self._stacks[name]), -1, out.shape[-1])
        for piece, part in zip(pieces, self._stacks[name], strict=True):
            self._fill(piece, self._entries[part], 0)
        return out

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            found = f"{len(self._entries)} other tensors in {self._folder}"
            remedy = "download the checkpoint again, or check that config.json belongs to it"
            raise missing_error(name, found, remedy) from None

    def _fill(self, out: torch.Tensor, entry: _Entry, offset: int) -> None:
        """Fill the contiguous ``out`` with bytes of ``entry`` from ``offset`` on."""
        if out.numel() == 0:
            return
        array: Any = out.reshape(-1).view(torch.uint8).numpy()  # shares memory with `out`
        view = memoryview(array)
        file = self._file(entry.file)
        done = 0
        while done < len(view):
            # Caught here, where it is known to be about the model: a bundle is being written meanwhile.
            try:
                file.seek(entry.begin + offset + done)
                count = file.readinto(view[done:])
            except OSError as error:
                raise cannot_read(self._folder / entry.file, error) from error
            if not count:
                raise CheckpointError(
                    f"{entry.file} became shorter while it was read",
                    found=f"{done} of {len(view)} bytes of one tensor",
                    expected="a file that doesn't change during the export",
                    remedy="leave the checkpoint alone while it is exported, and start again",
                )
            done += count

    def _file(self, name: str) -> io.BufferedReader:
        if self._open_files is None:
            raise closed_error()
        if name not in self._open_files:
            path = self._folder / name
            try:
                self._open_files[name] = path.open("rb")
            except OSError as error:
                raise cannot_read(path, error) from error
        return self._open_files[name]


def _expert_stacks(entries: dict[str, _Entry]) -> dict[str, tuple[str, ...]]:
    """Module tensor to the stored matrices that make it up, expert by expert; gate before up.

    The same stacking as transformers' ``conversion_mapping.py`` does for ``qwen2_moe`` and ``qwen3_moe``.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in entries:
        if match := _EXPERT.fullmatch(name):
            kinds = found.setdefault(match["block"], {"gate": {}, "up": {}, "down": {}})
            kinds[match["kind"]][int(match["index"])] = name
    stacks: dict[str, tuple[str, ...]] = {}
    for block, kinds in found.items():
        count = 1 + max(index for indices in kinds.values() for index in indices)
        for kind, indices in kinds.items():
            _check_experts(block, kind, indices, count, entries)
        stacks[f"{block}.gate_up_proj"] = tuple(kinds[k][e] for e in range(count) for k in ("gate", "up"))
        stacks[f"{block}.down_proj"] = tuple(kinds["down"][e] for e in range(count))
    return stacks


def _check_experts(
    block: str, kind: str, indices: dict[int, str], count: int, entries: dict[str, _Entry]
) -> None:
    missing = [index for index in range(count) if index not in indices]
    forms = {(entries[name].shape, entries[name].dtype) for name in indices.values()}
    if missing or len(forms) > 1 or len(next(iter(forms))[0]) != 2:
        what = f"no expert {missing[:5]}" if missing else f"{len(forms)} different shapes and dtypes"
        raise CheckpointError(
            f"the experts of {block} don't fit together",
            found=f"{kind}_proj: {what}",
            expected=f"{count} matrices of one shape and dtype",
            remedy="download the checkpoint again",
        )


def _check_index(wanted: dict[str, str], entries: dict[str, _Entry]) -> None:
    problems = [
        f"{name} should be in {file}" + (f" but is in {entries[name].file}" if name in entries else "")
        for name, file in sorted(wanted.items())
        if name not in entries or entries[name].file != file
    ]
    unlisted = sorted(set(entries) - set(wanted))
    problems += [f"{name} in {entries[name].file} isn't listed" for name in unlisted]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{INDEX_FILE} and its shards disagree",
            found="; ".join(problems[:5]) + more,
            expected="exactly the tensors that the index lists, each in its shard",
            remedy="download the checkpoint again",
        )


def _read_header(path: Path) -> dict[str, _Entry]:
    unusable = f"{path.name} can't be used"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise damaged(unusable, error, "a readable file", "download the missing file") from error
    if start == b"version " and size < 1024:
        raise damaged(
            unusable, "a Git LFS pointer", "the file that it points to", "run git lfs pull in that folder"
        )
    if length == 0 or length > _MAX_HEADER_BYTES or len(text) < length:
        expected = f"{8 + length:,} bytes of header" if 0 < length <= _MAX_HEADER_BYTES else "a header"
        raise damaged(unusable, f"{size:,} bytes", f"safetensors with {expected}, and data")
    try:
        header = json.loads(text)
        entries = {n: _entry_of(path, i, 8 + length) for n, i in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(unusable, f"a header that can't be read: {error!r}", "a safetensors header") from error
    end = max((entry.begin + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise damaged(unusable, f"{size:,} bytes", f"{end:,} bytes, by its own header")
    try:
        with safe_open(os.fspath(path), framework="pt"):
            return entries
    except (SafetensorError, OSError) as error:
        raise damaged(unusable, error, "what the safetensors library accepts") from error


def _entry_of(path: Path, info: dict[str, Any], data: int) -> _Entry:
    dtype = _DTYPES[info["dtype"]]
    shape = tuple(info["shape"])
    begin, end = info["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, offsets {begin}, {end}")
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes != end - begin:
        raise ValueError(f"{info['dtype']} {list(shape)} takes {nbytes} bytes, not {end - begin}")
    return _Entry(path.name, dtype, shape, data + begin, nbytes)
