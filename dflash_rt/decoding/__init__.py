"""Decoding of a sequence.

- ``loop``: prefill, draft, verify, accept and commit.
- ``sequence``: tokens and counters of a sequence.
- ``policy``: the protocol that chooses each step's length, and a fixed one.
"""
