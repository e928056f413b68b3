"""The systems that ``--compare`` offers, by name. A factory imports its libraries when it is called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dflash_bench.systems.base import BenchSetup, System, SystemFactory
from dflash_bench.systems.genai import make_genai, make_genai_int4
from dflash_bench.systems.pytorch import make_hf, make_reference
from dflash_rt.errors import DFlashError, RequestError

__all__ = ["ALL", "FACTORIES", "find_factories", "make_systems"]

ALL = "all"
"""In place of names: every system that can be made here; the others are skipped."""

FACTORIES: dict[str, SystemFactory] = {
    "genai": make_genai,
    "genai-int4": make_genai_int4,
    "hf": make_hf,
    "reference": make_reference,
}


def find_factories(names: Iterable[str]) -> dict[str, SystemFactory]:
    """Factories by name, in the order of the names; for :data:`ALL` every other one at the end.

    Raises:
        RequestError: there is no system of a name.
    """
    wanted = dict.fromkeys(names)
    if ALL in wanted:
        del wanted[ALL]
        wanted |= dict.fromkeys(FACTORIES)
    if unknown := [name for name in wanted if name not in FACTORIES]:
        raise RequestError(
            "there is nothing of that name to compare with",
            found=", ".join(map(repr, unknown)),
            expected=", ".join([*FACTORIES, ALL]),
            remedy="check the spelling",
        )
    return {name: FACTORIES[name] for name in wanted}


def make_systems(compare: Sequence[str], setup: BenchSetup) -> tuple[list[System], dict[str, str]]:
    """Make what ``compare`` names, and say why some were left out.

    A system asked for by name has to work; one that came with :data:`ALL` may be skipped. Returns the
    systems, and the reasons of those skipped by name.

    Raises:
        RequestError: an unknown name.
        DFlashError: a system asked for by name can't be made; those made before it are closed.
    """
    made: list[System] = []
    skipped: dict[str, str] = {}
    for name, factory in find_factories(compare).items():
        setup.say(f"loading {name}")
        try:
            made += factory(setup)
        except DFlashError as error:
            if name in compare:
                for system in made:
                    system.close()
                raise
            found = error.problem.found
            skipped[name] = error.problem.what + (f" ({' '.join(found.split())})" if found else "")
            setup.say(f"{name} is skipped: {skipped[name]}")
    return made, skipped
