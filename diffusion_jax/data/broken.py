"""Broken images: left out while training, or all found beforehand."""

import dataclasses
import os
from concurrent import futures

from diffusion_jax.data import images, sources
from diffusion_jax.system import distributed, terminal
from diffusion_jax.system.errors import UserError

_SHOWN = 20  # names in a message
_AT_ONCE = 1000  # images in the queue of the threads


def left_out(source: sources.Source) -> sources.Source:
  """The same images, but the next whole one in place of each broken one.

  The number of images stays the same, and so does the order of the others: the
  image at a position depends on the files only, so that it is the same on every
  host and after every start. After the last image comes the first. A broken
  image is named on stderr when it is met, and kept in `broken`.

  Args:
    source: any source; its read_fn raises `images.Broken`.

  Returns:
    A Source whose read_fn raises UserError only if all images are broken, or
    one is refused for another reason.
  """
  found = {}

  def read(index):
    for k in range(len(source)):
      at = (index + k) % len(source)
      if at in found:
        continue
      try:
        return source.read_fn(at)
      except images.Broken as error:
        told = str(error)
        if found.setdefault(at, told) is told:  # not by another thread
          terminal.say(f'left out: {error}')
    raise UserError(f'all images are broken: {source.description}')

  def stand_in(index):
    """The index of the image that was read in the place of this one."""
    while index in found:
      index = (index + 1) % len(source)
    return index

  return dataclasses.replace(
    source, read_fn=read, broken=found, stand_in_fn=stand_in
  )


def say_left_out(*opened: sources.Source | None) -> None:
  """Prints how many broken images were left out, on all processes together."""
  here = [why for source in opened if source for why in source.broken.values()]
  there = {why for every in distributed.gather(here) for why in every}
  if there:
    number = f'{len(there)} broken image{"s" * (len(there) > 1)}'
    terminal.say(f'data: {number} left out: {listed(there)}')


def find(*opened: sources.Source | None) -> list[UserError]:
  """Decodes all images: the errors of those that fail, in order.

  Args:
    *opened: the sources; None has no images.
  """
  jobs = [
    (source, i) for source in opened if source for i in range(len(source))
  ]

  def look(job):
    source, index = job
    try:
      source.read_fn(index)
    except UserError as error:
      return error
    return None

  errors = []
  progress = terminal.Progress('decoding', len(jobs), unit='images')
  with progress, futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(jobs), _AT_ONCE):
      for error in pool.map(look, jobs[start : start + _AT_ONCE]):
        progress.update()
        errors += [error] if error else []
  return errors


def listed(errors) -> str:
  """The first ones, in order, and how many more there are."""
  shown = '; '.join(sorted(map(str, errors))[:_SHOWN])
  more = len(errors) - _SHOWN
  return shown + f'; and {more} more' * (more > 0)
