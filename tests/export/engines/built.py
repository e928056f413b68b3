"""What is really handed to TensorRT's builder, noted at the moment of the build."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from dflash_export.engines.network import Network
from dflash_rt import Bundle
from dflash_rt.bundle.manifest import TensorSpec

_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """One attention of a network."""

    decomposable: bool
    has_mask: bool
    has_lengths: bool
    caches: tuple[str, str]


@dataclass(frozen=True)
class Handed:
    """A network and its configuration. ``profiles``: for each input with a free axis, min, opt and max."""

    inputs: list[tuple[str, str, Shape]]
    outputs: list[tuple[str, str]]
    aliases: dict[str, str]
    attentions: list[Attention]
    profiles: list[dict[str, tuple[Shape, ...]]]
    targets: list[str]
    flags: frozenset[str]
    workspace: int


@contextlib.contextmanager
def watch_builds(trt: Any) -> Iterator[list[Handed]]:
    """Note every build of the library ``trt`` (tensorrt_rtx) while open; they happen as they would."""
    builds: list[Handed] = []
    profiles: list[Any] = []
    real_add = trt.IBuilderConfig.add_optimization_profile
    real_build = trt.Builder.build_serialized_network

    def add(config: Any, profile: Any) -> int:
        profiles.append(profile)
        return int(real_add(config, profile))

    def build(builder: Any, definition: Any, config: Any) -> Any:
        assert config.num_optimization_profiles == len(profiles)
        builds.append(_handed(trt, definition, config, profiles))
        profiles.clear()
        return real_build(builder, definition, config)

    with (
        mock.patch.object(trt.IBuilderConfig, "add_optimization_profile", add),
        mock.patch.object(trt.Builder, "build_serialized_network", build),
    ):
        yield builds


def _handed(trt: Any, definition: Any, config: Any, profiles: list[Any]) -> Handed:
    network = Network(trt, definition)
    free = [tensor.name for tensor in network.inputs if -1 in tuple(tensor.shape)]
    return Handed(
        inputs=[(t.name, t.dtype.name, tuple(t.shape)) for t in network.inputs],
        outputs=[(t.name, t.dtype.name) for t in network.outputs],
        aliases=dict(_updates(network)),
        attentions=[
            Attention(
                each.decomposable,
                each.mask is not None,
                each.key_value_lengths is not None,
                (each.get_input(1).name, each.get_input(2).name),
            )
            for each in network.attentions()
        ],
        profiles=[{name: tuple(map(tuple, each.get_shape(name))) for name in free} for each in profiles],
        targets=[config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)],
        flags=frozenset(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)),
        workspace=config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    )


def _updates(network: Network) -> Iterator[tuple[str, str]]:
    for layer in network.layers:
        if layer.type.name == "KV_CACHE_UPDATE":
            assert layer.get_input(0).is_network_input
            assert layer.get_output(0).is_network_output
            yield layer.get_output(0).name, layer.get_input(0).name


def check_handed(
    handed: Handed, bundle: Bundle, graph: str, *, capacity: int, chunk: int, block: int, sms: tuple[int, ...]
) -> None:
    """What was built is what manifest.json says, in every size that the backends will ask for."""
    manifest = bundle.manifest
    spec = manifest.graphs[graph]
    free = {"batch": -1, "rows": -1, "capacity": capacity}
    assert handed.inputs == [(t.name, _NAMES[t.dtype], _shape(t, free)) for t in spec.inputs]
    assert handed.outputs == [(t.name, _NAMES[t.dtype]) for t in spec.outputs]
    assert handed.aliases == spec.aliases
    layers = {"target": manifest.target.num_layers, "draft": manifest.drafter.num_layers}
    assert len(handed.attentions) == layers.get(graph, 0)
    for attention in handed.attentions:
        assert attention.decomposable is (manifest.precision == "fp32")
        assert attention.has_mask
        assert attention.has_lengths
        assert set(attention.caches) <= set(spec.aliases)
    ranges = {"prefill": (1, chunk, chunk), "block": (1, block, block)}
    passes = {"embed": ["prefill"], "target": ["prefill", "block"], "inject": ["prefill", "block"]}
    assert handed.profiles == [
        {
            tensor.name: tuple(
                _shape(tensor, {"batch": 1, "rows": rows, "capacity": capacity}) for rows in ranges[name]
            )
            for tensor in spec.inputs
            if -1 in _shape(tensor, free)
        }
        for name in passes.get(graph, ["block"])
    ]
    assert handed.targets == [f"SM{number}" for number in sms]


def _shape(tensor: TensorSpec, sizes: dict[str, int]) -> Shape:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
