"""rwkv_accel: an Accelerate-based, multi-node trainer and launcher for RWKV-7 language models."""

__version__ = "0.1.0"
