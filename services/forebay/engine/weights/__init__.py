"""Weights from files: one reader per format, all under the names of Hugging Face checkpoints."""
