"""All training images on the devices, from which the training step takes rows.

The host then sends the order of the images only, 5 bytes an image. Every device
holds all images: to take rows of a batch needs no communication on any mesh.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.data import captions
from diffusion_jax.data.sources import Source
from diffusion_jax.system.errors import UserError

# The part of a device's memory that images may take: the rest is needed.
PART = 0.5


def check(source: Source) -> None:
  """Checks that all images fit into the memory of each device.

  Args:
    source: the training images.

  Raises:
    UserError: they do not.
  """
  needed = len(source) * (source[0][source.row].nbytes + 4)
  if source.encode_fn:
    count = sum(map(len, captions.of(source, np.arange(len(source)))))
    needed += count * source.encode_fn(['']).nbytes + 4 * len(source)
  there = min(map(_memory, jax.local_devices()))
  if needed > PART * there:
    raise UserError(
      f'data.on_device=True: {len(source)} images take {needed / 1e9:.1f} GB '
      f'of the {there / 1e9:.1f} GB of each device, of which {PART:.0%} are '
      'for images: set it to False'
    )


def _memory(device) -> int:
  """Bytes; of a CPU those of the machine, divided among its devices."""
  found = (device.memory_stats() or {}).get('bytes_limit')
  if found:
    return found
  pages, size = os.sysconf('SC_PHYS_PAGES'), os.sysconf('SC_PAGE_SIZE')
  return pages * size // jax.local_device_count()


def read(source: Source) -> dict[str, np.ndarray]:
  """All images: {'image': uint8 [N, H, W, C], 'label': int32 [N]}.

  Or all latents, {'moments': float32 [N, E, h, w, m], ...}. If captions become
  tokens, with all of them as 'text', see `captions.all_tokens`.

  Args:
    source: the training images.
  """
  first = source[0][source.row]
  image = np.empty((len(source), *first.shape), first.dtype)
  label = np.empty(len(source), np.int32)
  for i in range(len(source)):
    record = source[i]
    image[i], label[i] = record[source.row], record['label']
  found = {source.row: image, 'label': label}
  return found | (
    {'text': captions.all_tokens(source)} if source.encode_fn else {}
  )


def place(images: dict[str, np.ndarray], mesh: jax.sharding.Mesh):
  """Places all images on each device, as global arrays.

  Args:
    images: from `read`.
    mesh: the devices.
  """
  where = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(where, rows), images
  )


def take(images: dict[str, jax.Array], order: dict) -> dict[str, jax.Array]:
  """Inside a jitted step: the rows of a batch, as the loader would make them.

  Args:
    images: all images, from `place`.
    order: 'index' int32 [B], 'mirrored' bool [B], 'augment' and 'choice', if
      there.
  """
  text = images.get('text')
  rows = {k: x[order['index']] for k, x in images.items() if k != 'text'}
  if text:
    first, end = (text['firsts'][order['index'] + k] for k in (0, 1))
    number = order['choice'] % (end - first).astype(jnp.uint32)
    rows['tokens'] = text['ids'][first + number.astype(jnp.int32)]
  mirrored = order['mirrored'][:, None, None, None]
  if 'image' in rows:
    image = rows['image']
    rows['image'] = jnp.where(mirrored, image[:, :, ::-1], image)
  else:
    both = rows['moments']
    rows['moments'] = jnp.where(mirrored, both[:, -1], both[:, 0])
  return rows | {k: x for k, x in order.items() if k == 'augment'}
