"""The command ``dflash-rt``.

- ``main``: its subcommands.
- ``console``: errors and output; ``options``: common options. All packages share both.
"""
