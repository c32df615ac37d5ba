"""The shipped configs: `from diffusion_jax.configs import default, cifar10`.

Their files lie in configs/ at the top of a checkout, where people look for
them. This module finds them there as if it were that package. A wheel has the
package itself inside diffusion_jax, and Python prefers it to this module.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / 'configs')]
