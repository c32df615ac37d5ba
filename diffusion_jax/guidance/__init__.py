"""Guidance: denoiser -> denoiser."""
