"""Checkpoints and exported models: folders and files of safetensors and JSON, read without running code from them."""
