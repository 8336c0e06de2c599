"""Publishes a checkpoint: a model card, and the upload to the Hugging Face hub."""
