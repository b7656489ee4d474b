"""Guidance: each a map from denoisers to a denoiser."""
