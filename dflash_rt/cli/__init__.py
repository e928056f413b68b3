"""The command ``dflash-rt``.

- ``main``: its subcommands.
- ``console``: errors and output, shared by the command lines of all packages.
"""
