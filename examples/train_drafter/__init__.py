"""Train a DFlash v1 drafter for a target of your own: data, training, evaluation, card. See README.md."""
