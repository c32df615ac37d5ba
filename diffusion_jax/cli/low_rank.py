"""Low-rank changes (LoRA) of the network that samples are drawn with: --lora.

`flags.adopt_module_key_flags(low_rank)` makes the flag a binary's own.
"""

import functools

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare
from diffusion_jax.runs import adapted
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_multi_string(
  'lora', None,
  'Low-rank changes (LoRA) of the network: FILE or FILE:SCALE, such as '
  'style.safetensors:0.8, of a safetensors file. Several add up.',
)  # fmt: skip


def asked() -> tuple[adapted.Change, ...]:
  """What --lora asks for, in order; read once.

  Raises:
    UserError: a file cannot be read, or is for another network.
  """
  return tuple(_read(text, FLAGS.workdir) for text in FLAGS.lora or ())


@functools.cache
def _read(text: str, workdir) -> adapted.Change:
  path, scale = _parsed(text)
  return adapted.read(path, scale, runs.read_config(declare.workdir()))


def _parsed(text: str) -> tuple[str, float]:
  """FILE or FILE:SCALE -> the path and the scale."""
  path, colon, scale = text.rpartition(':')
  if not colon or files.at(text).expanduser().exists() or '/' in scale:
    return text, 1.0
  try:
    return path, float(scale)
  except ValueError as e:
    raise UserError(
      f'--lora={text}: the scale after the colon must be a number, as in '
      'FILE:0.8'
    ) from e


def applied(trained: Trained) -> Trained:
  """The network with the changes that --lora asks for."""
  for change in asked():
    trained = adapted.applied(trained, change)
  return trained


def name() -> list[str]:
  """The parts of a name of samples that say what changes the network."""
  return [f'lora{one.sha256[:8]}x{one.scale:g}' for one in asked()]
