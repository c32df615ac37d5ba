"""ControlNets that steer the samples that are drawn: --control.

`flags.adopt_module_key_flags(steering)` makes the flags a binary's own.
"""

import functools

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare
from diffusion_jax.runs import controlled, sizes
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_multi_string(
  'control', None,
  "Folder of a ControlNet (diffusers' ControlNetModel) that steers samples by "
  'the picture of --control_image. Several add up.',
)  # fmt: skip
flags.DEFINE_multi_string(
  'control_image', None,
  'Picture for --control, as it needs it: of edges or depths, say; one for '
  'each.',
)  # fmt: skip
flags.DEFINE_multi_float(
  'control_scale', None,
  'Factor on what --control adds, 1 by default; one for each.',
)  # fmt: skip


def asked(image_size=None) -> list[controlled.Steering]:
  """What --control asks for, in order; read once.

  Args:
    image_size: of the samples, see `sizes.parsed`.

  Raises:
    UserError: files cannot be read or are for another network, or there are not
      as many pictures.
  """
  folders = FLAGS.control or []
  pictures, scales = FLAGS.control_image or [], FLAGS.control_scale
  scales = [1.0] * len(folders) if scales is None else scales
  for name, given in (('control_image', pictures), ('control_scale', scales)):
    if len(given) != len(folders):
      raise UserError(
        f'--control is given {len(folders)} times, --{name} {len(given)} '
        'times: give one for each'
      )
  if not folders:
    return []
  sides = sizes.parsed(image_size, runs.read_config(declare.workdir()))
  each = zip(folders, pictures, scales, strict=True)
  return [_read(*one, sides, FLAGS.workdir) for one in each]


@functools.cache
def _read(folder, picture, scale, sides, workdir) -> controlled.Steering:
  config = runs.read_config(declare.workdir())
  return controlled.read(folder, picture, scale, config, sides)


def applied(trained: Trained, image_size=None) -> Trained:
  """The network with the ControlNets that --control asks for, see `asked`."""
  for steering in asked(image_size):
    trained = controlled.applied(trained, steering)
  return trained


def name(image_size=None) -> list[str]:
  """The parts of a name of samples that say what steers them, see `asked`."""
  facts = [one.facts for one in asked(image_size)]
  return [
    f'control{one["sha256"][:8]}of{one["picture_sha256"][:8]}x{one["scale"]:g}'
    for one in facts
  ]
