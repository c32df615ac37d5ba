"""Train and sample diffusion models in JAX."""

from diffusion_jax.runs.trained import Trained, load

__all__ = ['Trained', 'load']
__version__ = '0.1.0'
