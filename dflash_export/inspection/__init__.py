"""What ``dflash-export inspect`` shows."""
