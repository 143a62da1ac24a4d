"""Iterated fine-tuning campaigns for universal machine-learned interatomic potentials."""

__version__ = "0.1.0"
