"""Trained weights: their files, their way into and out of a pipeline, and the algebra on them."""
