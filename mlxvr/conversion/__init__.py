"""From a Hub repository or folder to quantized MLX weights."""
