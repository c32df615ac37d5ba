"""Rules for the arguments of networks, before one is built."""

from collections.abc import Iterator

from diffusion_jax.models import dit, layers, styles
from diffusion_jax.system.errors import UserError


def of_network(
  model, image_shape, what: str = 'data.image_size'
) -> Iterator[tuple[bool, str]]:
  """Yields (holds, message) for each rule of a network.

  Args:
    model: the group `model` of a config.
    image_shape: (H, W, ...) of the images, or of what is diffused.
    what: what has this size, for the messages.
  """
  unknown = sorted(set(model.plain) - set(layers.MEASURES))
  yield (
    not unknown,
    f'model.plain={model.plain}: names among {", ".join(layers.MEASURES)}',
  )
  size = image_shape[:2]
  if model.name == 'dit':
    yield from _dit(model, size)
  else:
    yield from _unet(model, size, what)


def _dit(model, size):
  yield _details(styles.changed, dit.DETAILS, model.details)
  yield (
    model.num_heads > 0 and model.channels % model.num_heads == 0,
    f'model.num_heads={model.num_heads} does not divide '
    f'model.channels={model.channels}',
  )
  yield (
    model.channels % 4 == 0,
    f"model.channels={model.channels}: a multiple of 4 for model.name='dit'",
  )
  patch = max(model.patch_size, 1)
  yield (
    all(side > 0 and side % patch == 0 for side in size),
    f'model.patch_size={model.patch_size} does not divide the images of '
    f'{size[0]}x{size[1]}: give a size that does',
  )


def _unet(model, size, what):
  yield _details(styles.create, model.style, model.details)
  levels = len(model.multipliers)
  halved = 2 ** (levels - 1)
  yield levels > 0, 'model.multipliers is empty: give one per level'
  whole = all(isinstance(multiplier, int) for multiplier in model.multipliers)
  yield whole, f'model.multipliers={model.multipliers}: whole numbers'
  if not whole:
    return
  yield (
    all(side > 0 and side % halved == 0 for side in size),
    f'{what}={size[0] if size[0] == size[1] else tuple(size)}: '
    f'{levels} model.multipliers halve it {levels - 1} times, so it must be a '
    f'multiple of {halved}',
  )
  heads = 'head_channels' if model.head_channels else 'num_heads'
  maps = [min(size) // 2**level for level in range(levels)]
  attends = [at in model.attention_resolutions for at in maps]
  if depths := model.transformer_depths:
    good = all(isinstance(depth, int) and depth >= 0 for depth in depths)
    good = good and len(depths) == levels + 1
    yield (
      good,
      f'model.transformer_depths={depths}: a whole number for each of {levels} '
      f'levels and one for the middle, {levels + 1} in all, or () for none',
    )
    if not good:
      return
    attends = [depth > 0 for depth in depths[:-1]]
  attending = {
    multiplier
    for multiplier, attend in zip(model.multipliers, attends, strict=True)
    if attend
  }
  attending |= set(model.multipliers[-1:])  # the middle
  for multiplier in sorted(set(model.multipliers)):
    width = model.channels * multiplier
    for name in ('num_groups', heads):
      if name == 'head_channels' and multiplier not in attending:
        continue
      yield (
        model[name] > 0 and width > 0 and width % model[name] == 0,
        f'model.{name}={model[name]} does not divide {width} channels '
        f'(model.channels={model.channels} x {multiplier})',
      )
  for resolution in () if depths else model.attention_resolutions:
    yield (
      resolution in maps,
      f'model.attention_resolutions has {resolution}, but the maps are of size '
      f'{", ".join(map(str, maps))}: give some of these, or () for none',
    )


def _details(change, *arguments) -> tuple[bool, str]:
  try:
    change(*arguments)
  except UserError as e:
    return False, str(e)
  return True, ''
