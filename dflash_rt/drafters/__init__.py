"""Kinds of drafters: one file for each, and this registry. docs/guide/extending.md says how to add one."""

from __future__ import annotations

from dflash_rt.drafters.base import Drafter
from dflash_rt.drafters.block import BlockDrafter
from dflash_rt.drafters.own_vocabulary import OwnVocabularyDrafter
from dflash_rt.drafters.selector import SelectorDrafter

__all__ = ["DRAFTERS", "Drafter"]

DRAFTERS: dict[str, type[Drafter]] = {
    drafter.kind: drafter for drafter in (BlockDrafter, SelectorDrafter, OwnVocabularyDrafter)
}
"""By kind, in the order in which messages list them."""
