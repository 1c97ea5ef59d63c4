"""Evaluations beside the held-out loss: what a trainer asks of a model on conversations."""
