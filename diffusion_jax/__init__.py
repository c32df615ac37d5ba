"""diffusion_jax: train and sample diffusion models in JAX."""

__version__ = '0.1.0'
