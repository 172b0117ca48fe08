"""What is made once and kept."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kept(cache: dict, key, make: Callable):
    """cache[key], made now if it is not there: never of inference tensors, which a later training step could not use."""
    if key not in cache:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            cache[key] = make()
        else:
            with torch.inference_mode(False):
                cache[key] = make()
    return cache[key]
