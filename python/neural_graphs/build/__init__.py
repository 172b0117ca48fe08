"""From networks as they come, modules and files, to neural graphs."""

from .files import CheckpointError
from .kernels import pad_kernel
from .llama import from_llama
from .module import from_module
from .network import Channels, Network, Origin, from_layers
from .state import describe_safetensors, from_safetensors, from_state_dict
from .streamed import stream_safetensors

__all__ = [
    "Channels",
    "CheckpointError",
    "Network",
    "Origin",
    "describe_safetensors",
    "from_layers",
    "from_llama",
    "from_module",
    "from_safetensors",
    "from_state_dict",
    "pad_kernel",
    "stream_safetensors",
]
