"""Distillation of BERT-like encoders with DeepSpeed."""

__version__ = "0.1.0"
