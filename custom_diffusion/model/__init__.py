"""The model that is taught: where it lies, how it is loaded, and what of it is trained."""
