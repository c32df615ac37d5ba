"""The most expensive operations of a program: by time, and by bytes."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from diffusion_jax.planning import kernels
from diffusion_jax.system import terminal

CALLS = 3  # that a profile averages over
MOST = 10


class Operation(NamedTuple):
  """Kernels of a program that are alike: of one kind, source and shape.

  Attributes:
    kind: what they do, in words.
    source: the JAX operation that they come from.
    shape: of the result.
    count: how many run in a call of the program.
    seconds: that they take in a call; 0 if they are not in the profile.
    bytes: of their operands and results in a call.
  """

  kind: str
  source: str
  shape: str
  count: int
  seconds: float
  bytes: int


def profiled(
  call: Callable[[int], None], program: jax.stages.Compiled
) -> list[Operation]:
  """Runs a program under JAX's profiler.

  Args:
    call: runs the program that many times and waits for the end.
    program: the program, whose text says what moves how many bytes.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      call(CALLS)
    (path,) = Path(folder).glob('**/*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(path))
    seconds = {k: s / CALLS for k, s in _seconds(data).items()}
  return joined(kernels.kernels(program.as_text()), seconds)


def joined(
  found: Iterable[kernels.Kernel], seconds: dict[str, float]
) -> list[Operation]:
  """Joins kernels with the times of a profile.

  Args:
    found: the kernels of a program.
    seconds: name of a kernel -> its seconds in a call of the program.
  """
  groups = {}
  for one in found:
    key = one.kind, one.source, one.shape
    before = groups.get(key, Operation(*key, 0, 0.0, 0))
    groups[key] = before._replace(
      count=before.count + one.count,
      seconds=before.seconds + seconds.get(one.name, 0.0),
      bytes=before.bytes + one.moved,
    )
  return list(groups.values())


def summary(found: Sequence[Operation], images: int) -> dict:
  """The ten most expensive operations by time and by bytes, as JSON.

  Args:
    found: the operations of a program.
    images: images in a call.
  """
  return {
    'images': images,
    'kernels': sum(one.count for one in found),
    'seconds': sum(one.seconds for one in found),
    'bytes': sum(one.bytes for one in found),
    **{
      f'by {name}': [
        one._asdict()
        for one in sorted(found, key=lambda one: -getattr(one, name))[:MOST]
      ]
      for name in ('seconds', 'bytes')
    },
  }


def tables(found: Mapping) -> list[str]:
  """A summary as text."""
  images = found['images']
  lines = [
    f'{found["kernels"]} kernels, {found["seconds"] * 1e3:.4g} ms and '
    f'{found["bytes"] / images / 1e6:.1f} MB an image in all'
  ]
  for name in ('seconds', 'bytes'):
    rows = [
      (
        f'{one["kind"]}: {_short(one["source"])} {one["shape"]}'[:70],
        str(one['count']),
        f'{one["seconds"] * 1e3:.2f}',
        f'{one["bytes"] / images / 1e6:.2f}',
        f'{one[name] / found[name]:.1%}' if found[name] else '-',
      )
      for one in found[f'by {name}']
    ]
    heads = (f'most {name}', 'kernels', 'ms', 'MB an image', 'share')
    lines += ['', *terminal.table(heads, rows)]
  return lines


def _short(source: str) -> str:
  """The end of the path of a JAX operation."""
  return '/'.join(source.split('/')[-2:])


def _seconds(data) -> Counter:
  """Seconds of each kernel in a profile, by name.

  On a CPU they are in the threads of the host, elsewhere in the planes of the
  devices, on TPUs on a line of their own beside those of whole programs.
  """
  planes = [plane for plane in data.planes if plane.name.startswith('/device:')]
  total = Counter()
  for plane in planes or data.planes:
    lines = list(plane.lines)
    ops = [line for line in lines if line.name == 'XLA Ops']
    for line in ops or lines:
      for event in line.events:
        stats = dict(event.stats)
        if event.name.startswith('end: '):  # a mark of a CPU's threads
          continue
        if ops:
          total[re.match(r'%?([\w.-]*)', event.name)[1]] += event.duration_ns
        elif name := stats.get('hlo_op'):
          total[name] += event.duration_ns
  return Counter({name: ns / 1e9 for name, ns in total.items()})
