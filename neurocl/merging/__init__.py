"""Merging fine-tuned models without retraining."""
