"""Errors for programs that do not fit into a device, with remedies."""

from collections.abc import Mapping

from diffusion_jax.planning.page import gib
from diffusion_jax.system.errors import UserError


def does_not_fit(
  what: str, place: str, used: int, limit: int, advice: str
) -> UserError:
  """The error for something that does not fit.

  Args:
    what: the flag that asks for it.
    place: the devices in words.
    used: bytes that it needs on each.
    limit: bytes that each has.
    advice: what to do.
  """
  return UserError(
    f'{what} does not fit {place}: {gib(used)} per chip, {gib(used - limit)} '
    f'more than its {gib(limit)}; {advice}'
  )


def too_large(
  batch_size: int, place: str, used: int, limit: int, state: int,
  config: Mapping, mesh: Mapping[str, int],
) -> UserError:  # fmt: skip
  """The error for a batch that does not fit, with possible remedies.

  Args:
    batch_size: images per step.
    place: the devices in words.
    used: bytes that the training step needs on each.
    limit: bytes that each has.
    state: bytes of the state on each.
    config: the run's config.
    mesh: axis -> number of devices.
  """
  parts, pieces = mesh['data'] * mesh['fsdp'], config['microbatches']
  each = batch_size // parts
  remedies = []
  # The rest is activations, proportional to the images in a microbatch.
  share = (0.9 * limit - state) / max(used - state, 1)
  at_once = int(each / pieces * share)
  if at_once >= 1:
    smaller = [m for m in range(pieces + 1, each + 1) if each % m == 0]
    fitting = [m for m in smaller if each // m <= at_once]
    remedies += [f'--config.microbatches={m}' for m in fitting[:1]]
    remedies.append(f'--config.batch_size={at_once * pieces * parts}')
  if mesh['data'] > 1 and state > 0.2 * limit:
    remedies.append(f'--config.mesh.data=1 --config.mesh.fsdp={parts}')
  if config['model']['dtype'] == 'float32':
    remedies.append('--config.model.dtype=bfloat16')
  remedies.append('more or larger chips')
  advice = f'to make it fit, try {", or ".join(remedies)}'
  what = f'batch_size={batch_size}'
  return does_not_fit(what, place, used, limit, advice)
