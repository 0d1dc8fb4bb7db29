"""Train and publish image classifiers under differential privacy, as ordinary PyTorch Lightning."""
