"""Measure a model: losses, multiple choice and exact match."""
