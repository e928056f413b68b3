"""One benchmark harness for CPU and GPU: the command ``dflash-bench``."""
