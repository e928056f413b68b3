"""The command ``dflash-rt``, and what the command lines of all packages share."""
