"""Sharing: the repository, the model card, the upload."""
