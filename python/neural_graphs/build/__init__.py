"""From networks as they come, modules and files, to neural graphs."""

from .kernels import pad_kernel
from .module import from_module
from .network import Network, from_layers
from .state import CheckpointError, from_safetensors, from_state_dict

__all__ = ["CheckpointError", "Network", "from_layers", "from_module", "from_safetensors", "from_state_dict", "pad_kernel"]
