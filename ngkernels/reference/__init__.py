"""The ops in plain PyTorch: the specification, and the oracle that every kernel is tested against."""
