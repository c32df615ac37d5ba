"""Rows of a benchmark of the training step: what is measured, and how."""

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import operations
import ours_step
import rounds
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.models import layers
from diffusion_jax.runs import validation
from diffusion_jax.system.errors import UserError

HEADS = ('what', 'batch', 'dtype', 'side', 'ms', 'images/s', 'utilisation',
         'memory', 'compiled in')  # fmt: skip
WIDTHS = (7, 5, 8, 16, 24, 9, 11, 9, 11)
THEIRS = 'diffusers'
PACKAGES = ('torch', 'diffusers')
MATRIX = {'cpu': 2048}  # size of the matrix product; 8192 on accelerators


def places(
  config: ConfigDict,
  batch: Sequence[str] | None = None,
  dtype: Sequence[str] | None = None,
  what: Sequence[str] = ('step',),
  plain: Sequence[str] = ('none',),
) -> list[tuple[str, ConfigDict]]:
  """What each row measures: (a key of `ours_step.WHAT`, the config).

  Args:
    config: the run's config.
    batch: batch sizes; None = the config's.
    dtype: dtypes; None = the config's.
    what: keys of `ours_step.WHAT`.
    plain: the measures that our network does not take, 'none', 'all' or one of
      `layers.MEASURES`.

  Raises:
    UserError: one of them is not valid.
  """
  whats = rounds.words('what', what, list(ours_step.WHAT))
  dtypes = rounds.words(
    'dtype', dtype or [config.model.dtype], ('float32', 'bfloat16')
  )
  sizes = rounds.numbers('batch', batch or [str(config.batch_size)])
  plains = rounds.words('plain', plain, ['none', 'all', *layers.MEASURES])
  found = []
  for size, dtype, name in itertools.product(sizes, dtypes, plains):
    one = ours_step.on_one_device(config)
    one.batch_size, one.model.dtype = size, dtype
    if name != 'none':
      one.model.plain = layers.MEASURES if name == 'all' else (name,)
    if wrong := validation.check(one, jax.devices()[:1]):
      raise UserError(wrong[0])
    found += [(name, one) for name in whats]
  return found


def fits(clock: rounds.Clock, rows: Sequence[Mapping], size: int) -> bool:
  """Whether a row would end in time, judged by the rows before it.

  Args:
    clock: the time that is left.
    rows: the rows before it.
    size: its batch size.
  """
  if not rows:
    return clock.left > 0
  return clock.fits(
    max(row['row_seconds'] * max(size / row['batch'], 1) for row in rows)
  )


def measured(
  what: str,
  config: ConfigDict,
  now: list,
  rates: dict,
  clock: rounds.Clock,
  *,
  count: int = 7,
  secs: float = 1.0,
  vs: str | None = None,
  profile: bool = False,
) -> dict:
  """A row: both sides of one thing at one size.

  Args:
    what: a key of `ours_step.WHAT`.
    config: of the run, with the batch size and dtype.
    now: [our training state].
    rates: dtype -> FLOPs per second of a matrix product; filled in.
    clock: the time that is left.
    count: the number of rounds.
    secs: the least time of a round; calls are repeated until then.
    vs: the other side, None or THEIRS; not for a network that is plain.
    profile: whether to add our most expensive operations.
  """
  begin, dtype = time.monotonic(), config.model.dtype
  vs = None if config.model.plain else vs
  if dtype not in rates:
    size = MATRIX.get(jax.default_backend(), 8192)
    rates[dtype] = ours_step.matrix_rate(dtype, size)
  ours = ours_step.WHAT[what](config, ours_step.mesh(), now)
  calls, compiled = {'ours': ours.call}, {'ours': ours.compile_seconds}
  memory, before = {'ours': ours.bytes}, ours_step.peak_bytes()
  ours.call(1)
  if vs:
    calls[vs], peak = _theirs(what, config, now)
    compiled[vs] = _seconds(calls[vs])
  often = {
    name: max(1, math.ceil(secs / _seconds(call)))
    for name, call in calls.items()
  }
  found = rounds.alternating(
    {
      name: functools.partial(call, often[name]) for name, call in calls.items()
    },
    count,
    clock,
  )
  seconds = {name: times / often[name] for name, times in found.items()}
  if ours_step.peak_bytes() > before:  # it cannot be reset
    memory['ours'] = ours_step.peak_bytes()
  if vs:
    # The first call is slower, even where nothing is compiled.
    compiled[vs] = max(0.0, compiled[vs] - float(np.median(seconds[vs])))
    memory[vs] = peak()
  flops, size = ours_step.flops_per_image(config, what), config.batch_size

  def side(name):
    median = float(np.median(seconds[name]))
    return {
      'seconds': rounds.quartiles(seconds[name]),
      'calls_per_round': often[name],
      'images_per_sec': size / median,
      'utilisation': flops * size / median / rates[dtype],
      'bytes': memory[name],
      'compile_seconds': compiled[name],
    }

  row = {
    'what': what,
    'batch': size,
    'dtype': dtype,
    'plain': list(config.model.plain),
    'rounds': len(seconds['ours']),
    'flops_per_image': flops,
    'sides': {name: side(name) for name in seconds},
    'load_after': round(os.getloadavg()[0], 2),
  }
  if vs:
    # Of the two times of a round: a slowdown of a whole round cancels.
    row['ratio'] = rounds.quartiles(seconds['ours'] / seconds[vs])
  if profile:
    found = operations.profiled(ours.call, ours.program)
    row['operations'] = operations.summary(found, size)
  return {**row, 'row_seconds': time.monotonic() - begin}


def lines(row: Mapping) -> Iterator[tuple[str, ...]]:
  """The cells of a row's lines, one line for each side."""
  for name, side in row['sides'].items():
    memory = side['bytes']
    yield (
      row['what'],
      str(row['batch']),
      row['dtype'],
      _plain(row) or name,
      rounds.spread(side['seconds'], 1e3),
      rounds.figures(side['images_per_sec']),
      f'{side["utilisation"]:.1%}',
      f'{memory / 2**30:.2f} GiB' if memory else '-',
      f'{side["compile_seconds"]:.1f} s',
    )


def last(rows: Sequence[Mapping]) -> str:
  """The last line: the ratio of each row, or the best of our rows."""
  if not rows:
    return 'nothing was measured'
  ratios = [
    f'{rounds.spread(row["ratio"])} for {_place(row)}'
    for row in rows
    if 'ratio' in row
  ]
  if ratios:
    return f'time of ours / {THEIRS}: {"; ".join(ratios)}'
  best = max(rows, key=lambda row: row['sides']['ours']['utilisation'])
  return (
    f'best: {best["sides"]["ours"]["utilisation"]:.1%} of the matrix rate, '
    f'{_place(best)}'
  )


def _place(row) -> str:
  place = f'{row["what"]}, batch {row["batch"]}, {row["dtype"]}'
  return ', '.join(filter(None, [place, _plain(row)]))


def _plain(row) -> str:
  """The measures that ours does not take; '' = it takes all."""
  plain = row['plain']
  return f'{plain[0] if len(plain) == 1 else "all"} plain' if plain else ''


def _theirs(what, config, now) -> tuple[Callable, Callable]:
  """Their side: (how often -> None, () -> its peak memory in bytes)."""
  import torch
  import unet2d_step  # which needs torch

  params = jax.device_get(now[0].params[models.NET])
  theirs = unet2d_step.create(runs.to_plain(config), params)
  count = sum(p.numel() for p in theirs.network.parameters())
  if models.count(params) != count:
    raise RuntimeError(
      f'the two networks differ: {models.count(params)} parameters and {count}'
    )
  if what == 'step':
    batch = unet2d_step.on_device(ours_step.images(config))
    once = functools.partial(unet2d_step.step, theirs, batch)
  else:
    shape = (config.batch_size, *runs.image_shape(config.data))
    xt = unet2d_step.on_device(ours_step.noise(shape)).permute(0, 3, 1, 2)
    t = torch.arange(config.batch_size, device=xt.device)
    once = functools.partial(unet2d_step.forward, theirs, xt, t)

  def call(count):
    for _ in range(count):
      once()
    unet2d_step.finish()

  return call, unet2d_step.peak_bytes


def _seconds(call) -> float:
  start = time.perf_counter()
  call(1)
  return time.perf_counter() - start
