"""``python -m lightning_dp`` is ``lightning-dp``."""

from lightning_dp.cli import main

main()
