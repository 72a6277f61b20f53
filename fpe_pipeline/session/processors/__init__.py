"""The processors that compute edited layers, one module for each family of models."""
