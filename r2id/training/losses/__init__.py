"""The losses that the models are trained on."""
