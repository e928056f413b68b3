"""``python -m dflash_bench``: the command where its script isn't installed."""

from dflash_bench.cli import main

if __name__ == "__main__":
    main(prog_name="dflash-bench")
