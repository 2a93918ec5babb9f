"""Merged models, HF folders and state files from runs, adapters and checkpoints."""
