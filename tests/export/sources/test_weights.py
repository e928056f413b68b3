"""Reading tensors one at a time: the same numbers as transformers, and clear refusals of damaged files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dflash_export.errors import CheckpointError, UnsupportedModelError
from dflash_export.sources import weights as weights_module
from dflash_export.sources.resolve import open_weights, resolve_target
from dflash_export.sources.weights import Weights
from dflash_export.targets.config import load_target_config
from dflash_rt.errors import DFlashError
from tests.checkpoints import FAMILIES, SMOLLM2, check_message, open_target, save_target, target_config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_gguf(path: Path) -> Weights:
    source = resolve_target(path)
    return open_weights(source, load_target_config(source))


def folder_of(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def open_folder(folder: Path) -> Weights:
    return open_weights(resolve_target(folder))


# --- The same numbers as transformers ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_module(tmp_path: Path, family: str, tied: bool) -> None:
    save_target(tmp_path, family, tie_word_embeddings=tied)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    if tied:
        expected.pop("lm_head.weight")
    _, _, weights = open_target(tmp_path)
    with weights:
        assert weights.names() == sorted(expected)
        for name, value in expected.items():
            assert weights.shape(name) == tuple(value.shape)
            assert weights.dtype(name) == torch.float32
            assert torch.equal(weights.load(name, torch.float32), value), name
            assert torch.equal(weights.rows(name, 0, 2), value[:2]), name
        assert weights.total_bytes == sum(value.nbytes for value in expected.values())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_shards(tmp_path: Path, family: str) -> None:
    save_target(tmp_path / "whole", family)
    save_target(tmp_path / "shards", family, shard="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    with open_folder(tmp_path / "whole") as whole, open_folder(tmp_path / "shards") as shards:
        assert shards.names() == whole.names()
        for name in whole.names():
            assert torch.equal(whole.load(name, torch.float32), shards.load(name, torch.float32))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    value = torch.randn(7, 5).to(stored)
    with open_folder(folder_of(tmp_path, {"x": value})) as weights:
        assert weights.dtype("x") == stored
        loaded = weights.load("x", wanted)
        assert loaded.dtype == wanted
        assert torch.equal(loaded, value.to(wanted))
        assert torch.equal(weights.rows("x", 2, 5), value[2:5])


def test_result_belongs_to_the_caller(tmp_path: Path) -> None:
    with open_folder(folder_of(tmp_path, {"x": torch.zeros(3)})) as weights:
        weights.load("x", torch.float32).fill_(1)
        assert not weights.load("x", torch.float32).any()


@pytest.mark.parametrize("value", [torch.tensor(1.5), torch.empty(0, 3), torch.ones(1)])
def test_odd_shapes(tmp_path: Path, value: torch.Tensor) -> None:
    with open_folder(folder_of(tmp_path, {"x": value})) as weights:
        assert weights.shape("x") == tuple(value.shape)
        assert torch.equal(weights.load("x", torch.float32), value)


def test_buffers_that_transformers_recomputes_are_left_out(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "x": torch.ones(2)}
    with open_folder(folder_of(tmp_path, tensors)) as weights:
        assert weights.names() == ["x"]


# --- GGUF ---


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Weights]:
    source = resolve_target(SMOLLM2)
    with open_weights(source, load_target_config(source)) as weights:
        yield weights


def test_gguf_equals_transformers(smollm2: Weights) -> None:
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    expected = model.state_dict()
    expected.pop("lm_head.weight")  # tied
    assert smollm2.names() == sorted(expected)
    for name, value in expected.items():
        assert smollm2.shape(name) == tuple(value.shape)
        assert torch.equal(smollm2.load(name, torch.float32), value), name
    embedding = expected["model.embed_tokens.weight"]
    assert torch.equal(smollm2.rows("model.embed_tokens.weight", 16, 20), embedding[16:20])
    assert torch.equal(
        smollm2.rows("model.layers.3.self_attn.q_proj.weight", 5, 9),
        expected["model.layers.3.self_attn.q_proj.weight"][5:9],
    )
    assert smollm2.total_bytes == sum(value.nbytes for value in expected.values())


def write_gguf(
    path: Path, *, moe: bool = False, extra: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """A file of a tiny Qwen3 as llama.cpp's converter would name it, and its metadata."""
    family = "qwen3_moe" if moe else "qwen3"
    config = target_config(family, head_dim=128, num_hidden_layers=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    writer = gguf.GGUFWriter(path, family.replace("_", ""))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(1)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if moe:
        writer.add_key_length(128)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    arch = gguf.MODEL_ARCH.QWEN3MOE if moe else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, 1)
    for name, value in state.items():
        if name == "lm_head.weight":
            continue
        if name.endswith("gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            writer.add_tensor("blk.0.ffn_gate_exps.weight", gate.contiguous().numpy())
            writer.add_tensor("blk.0.ffn_up_exps.weight", up.contiguous().numpy())
            continue
        base = name.removesuffix(".weight")
        array = value.numpy()
        writer.add_tensor(
            f"{names.get_name(base)}.weight", array.astype(np.float16) if base.endswith("v_proj") else array
        )
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("moe", [False, True])
def test_gguf_of_another_family(tmp_path: Path, moe: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", moe=moe)
    if moe:  # transformers doesn't read the experts' size; its default is 768
        config = target_config("qwen3_moe", head_dim=128, num_hidden_layers=1, tie_word_embeddings=True)
    else:
        config = load_target_config(resolve_target(path))
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    with open_weights(resolve_target(path), config) as weights:
        assert weights.names() == sorted(set(expected) - {"lm_head.weight"})
        for name in weights.names():
            value = expected[name].half().float() if name.endswith("v_proj.weight") else expected[name]
            assert weights.shape(name) == tuple(value.shape), name
            assert torch.equal(weights.load(name, torch.float32), value), name


def test_gguf_tensors_that_transformers_passes_over_stay_visible(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", extra=lambda w: w.add_tensor("odd.weight", np.ones(3, np.float32)))
    with open_gguf(path) as weights:
        assert "odd.weight" in weights.names()


@pytest.mark.parametrize("kept", [3, 20, 200, 2_000, 20_000, -1])
def test_truncated_gguf(tmp_path: Path, kept: int) -> None:
    content = write_gguf(tmp_path / "t.gguf").read_bytes()[:kept]
    (tmp_path / "t.gguf").write_bytes(content)
    for read in (load_target_config, lambda source: open_weights(source, target_config("qwen3"))):
        if read is load_target_config and kept in (20_000, -1):
            continue  # the metadata is whole
        with pytest.raises(CheckpointError) as caught:
            read(resolve_target(tmp_path / "t.gguf"))
        check_message(caught, "t.gguf", "download")
    assert f"{len(content):,} bytes" in str(caught.value)


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    path.write_bytes(b"version https://git-lfs")
    for read in (load_target_config, lambda source: open_weights(source, target_config("qwen3"))):
        with pytest.raises(CheckpointError, match="not a GGUF file") as caught:
            read(resolve_target(path))
        check_message(caught, "b'vers'", "git lfs pull")


def test_split_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", extra=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(CheckpointError, match="one part of a split") as caught:
        open_gguf(path)
    check_message(caught, "part of 3", "merge the parts")


@pytest.mark.parametrize(
    ("found", "extra"),
    [
        ("rope_freqs.weight", lambda w: w.add_tensor("rope_freqs.weight", np.ones(64, np.float32))),
        ("qwen3.rope.scaling.type = yarn", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
        ("qwen3.rope.scaling.factor = 4.0", lambda w: w.add_rope_scaling_factor(4.0)),
    ],
)
def test_gguf_rope_that_would_be_lost(
    tmp_path: Path, found: str, extra: Callable[[gguf.GGUFWriter], None]
) -> None:
    path = write_gguf(tmp_path / "t.gguf", extra=extra)
    with pytest.raises(UnsupportedModelError, match="scales RoPE") as caught:
        open_gguf(path)
    check_message(caught, found, "export the safetensors checkpoint")


def test_gguf_rope_scaling_none_is_fine(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE))
    open_gguf(path).close()


def test_gguf_type_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", extra=lambda w: w.add_tensor("odd", np.ones(3, np.int32)))
    with pytest.raises(CheckpointError, match="odd is quantised in a way") as caught:
        open_gguf(path)
    check_message(caught, "I32", "upgrade the gguf package")


# --- Damaged safetensors ---


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (header(b"{", length=0), "a header"),
        (header(b"{}", length=2**40), "a header"),
        (header(b"{}", length=50), "58 bytes of header"),
        (header(b"not json"), "a header that can't be read"),
        (header(b"[]"), "a header that can't be read"),
        (header(b'{"x": 3}'), "a header that can't be read"),
        (header(b"[" * 100_000), "a header that can't be read"),
        (header(entry("F99"), b"12345678"), "F99"),
        (header(entry(shape=(3,)), b"12345678"), "takes 12 bytes, not 8"),
        (header(entry(shape=(-2,)), b"12345678"), "shape (-2,)"),
        (header(entry(offsets=(8, 0)), b"12345678"), "not -8"),
        (header(entry(offsets=(4, 12)), b"123456789012"), "safetensors library"),
        (header(entry(), b"1234"), "8 bytes, by its own header"),
        (header(entry(), b"1234567890"), "8 bytes, by its own header"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
    ids=range(17),
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be used") as caught:
        open_folder(tmp_path)
    text = str(caught.value)
    expected = fragment
    if "by its own header" in fragment:
        size = len(content)
        whole = 8 + len(entry()) + 8
        assert f"{size:,} bytes" in text
        expected = f"{whole:,} bytes, by its own header"
    check_message(caught, expected)


@pytest.mark.parametrize("kept", [0, 7, 100, 3_000, -1])
def test_truncated_checkpoint(tmp_path: Path, kept: int) -> None:
    path = save_target(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be used") as caught:
        open_folder(tmp_path)
    check_message(caught, f"{len(content[:kept]):,} bytes", "download the file again")


def shards(tmp_path: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "2.safetensors")
    return {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


def write_index(tmp_path: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"d": "2.safetensors"}, "d should be in 2.safetensors"),
        ({"b": "2.safetensors"}, "b should be in 2.safetensors but is in 1.safetensors"),
        ({"b": None}, "b in 1.safetensors isn't listed"),
    ],
)
def test_index_that_disagrees(tmp_path: Path, change: dict[str, str | None], fragment: str) -> None:
    weight_map = shards(tmp_path) | change
    write_index(tmp_path, {name: file for name, file in weight_map.items() if file is not None})
    with pytest.raises(CheckpointError, match="disagree") as caught:
        open_folder(tmp_path)
    check_message(caught, fragment, "download the checkpoint again")


def test_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, shards(tmp_path))
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors can't be used") as caught:
        open_folder(tmp_path)
    check_message(caught, "No such file", "download the missing file")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    save_file({"c": torch.ones(2), "a": torch.ones(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="tensor a is stored twice") as caught:
        open_folder(tmp_path)
    check_message(caught, "1.safetensors", "2.safetensors")


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_experts_that_do_not_fit_together(tmp_path: Path, change: str) -> None:
    path = save_target(tmp_path, "qwen3_moe") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    value = tensors.pop(name)
    if change == "shape":
        tensors[name] = value[1:].clone()
    elif change == "dtype":
        tensors[name] = value.half()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"experts of model\.layers\.1\.mlp\.experts") as caught:
        open_folder(tmp_path)
    check_message(caught, "up_proj: " + ("no expert [1]" if change == "missing" else "2 different"))


# --- Values that may not be exported, and misuse ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_not_finite(tmp_path: Path, bad: float, where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_CHECKED_AT_ONCE", 4)
    value = torch.ones(3, 5)
    value.view(-1)[where] = bad
    with (
        open_folder(folder_of(tmp_path, {"x": value})) as weights,
        pytest.raises(CheckpointError, match="tensor x holds values that are not finite") as caught,
    ):
        weights.load("x", torch.float32)
    check_message(caught, "1 of 15")


def test_too_large_for_half_precision(tmp_path: Path) -> None:
    with open_folder(folder_of(tmp_path, {"x": torch.tensor([1.0, -70000.0])})) as weights:
        assert weights.load("x", torch.bfloat16).isfinite().all()
        with pytest.raises(CheckpointError, match=r"tensor x doesn't fit torch\.float16") as caught:
            weights.load("x", torch.float16)
    check_message(caught, "7e+04", "6.55e+04", "bf16 or fp32")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    with (
        open_folder(folder_of(tmp_path, {"x": torch.ones(4).to(dtype)})) as weights,
        pytest.raises(CheckpointError, match="not stored in floating point") as caught,
    ):
        weights.load("x", torch.float32)
    check_message(caught, str(dtype), "not quantised")


def test_unknown_name(tmp_path: Path) -> None:
    with open_folder(folder_of(tmp_path, {"x": torch.ones(4)})) as weights:
        for read in (weights.shape, weights.dtype, lambda name: weights.load(name, torch.float32)):
            with pytest.raises(CheckpointError, match="no tensor y") as caught:
                read("y")
            check_message(caught, "1 other tensors")
    with (
        open_gguf(write_gguf(tmp_path / "t.gguf")) as weights,
        pytest.raises(CheckpointError, match="no tensor y"),
    ):
        weights.load("y", torch.float32)


def test_rows_outside(tmp_path: Path) -> None:
    with open_folder(folder_of(tmp_path, {"x": torch.ones(4, 2)})) as weights, pytest.raises(IndexError):
        weights.rows("x", 3, 5)


def test_close_twice_and_read_after(tmp_path: Path) -> None:
    gguf_weights = open_gguf(write_gguf(tmp_path / "t.gguf"))
    for weights, name in (
        (open_folder(folder_of(tmp_path, {"x": torch.ones(4)})), "x"),
        (gguf_weights, "model.embed_tokens.weight"),
    ):
        weights.close()
        weights.close()
        with pytest.raises(CheckpointError, match="was closed") as caught:
            weights.load(name, torch.float32)
        check_message(caught, "open it again")


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    folder_of(tmp_path, {"x": torch.ones(1000)})
    with open_folder(tmp_path) as weights:
        path = tmp_path / "model.safetensors"
        shutil.copy(path, tmp_path / "copy")
        with path.open("r+b") as file:
            file.truncate(500)
        with pytest.raises(CheckpointError, match="became shorter") as caught:
            weights.load("x", torch.float32)
    check_message(caught, "leave the checkpoint alone")


def test_errors_share_a_base(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DFlashError):
        open_folder(tmp_path)
