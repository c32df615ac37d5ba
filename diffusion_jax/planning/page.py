"""The results of preflight as text."""

from collections.abc import Iterator, Mapping

from diffusion_jax.system import terminal


def gib(count: float) -> str:
  """Bytes as text."""
  return f'{count / 2**30:.2f} GiB'


def mesh(shape: Mapping[str, int]) -> str:
  """The sizes of a mesh's axes as text."""
  return ' x '.join(f'{axis} {size}' for axis, size in shape.items())


# At low effort, see compiled.FAST.
ESTIMATE = '; --fast estimates memory, 8% to 22% too low where compared'


def lines(result: dict) -> Iterator[str]:
  """The results of preflight as lines of text.

  Args:
    result: the results as JSON.
  """
  name = result['topology'] or 'this machine'
  yield (
    f'{name}: {result["num_devices"]} {result["device"]}, '
    f'{mesh(result["mesh"])}, {result["dtype"]}'
  )
  kinds = [kind for kind in ('train', 'sample', 'judge') if kind in result]
  for kind in kinds:
    yield from ['', *_program(kind, result)]
  if 'predicted' in result:
    yield from ['', *_predicted(result)]
  yield from result['notes']
  if 'measured' in result:
    yield from ['', *_measured(result['measured'])]
  total = max(result[kind]['bytes']['total'] for kind in kinds)
  yield ''
  yield (
    f'it fits: {gib(total)} of {gib(result["memory"])} per chip, '
    f'{total / result["memory"]:.0%}' + ESTIMATE * result['fast']
  )


def _program(kind, result):
  program = result[kind]
  if kind == 'train':
    yield (
      f'training, batch {result["batch_size"]} in {result["microbatches"]} '
      f'microbatch{"es" * (result["microbatches"] > 1)}'
    )
  elif kind == 'judge':
    yield f'judging by Inception, {program["batch_size"]} images at once'
  else:
    yield (
      f'sampling, {program["batch_size"]} images at once, '
      f'{program["num_steps"]} steps of {program["sampler"]}'
      + f', {program["network_rows"]} rows of the network per image'
      * (program['network_rows'] != program['num_steps'])
    )
  rows = [
    (name, f'{size:,}', f'{size / result["memory"]:.1%}')
    for name, size in program['bytes'].items()
  ]
  yield from terminal.table(['bytes per chip', '', 'of its memory'], rows)
  yield (
    f'{program["product_flops_per_image"] / 1e9:,.2f} GFLOP per image in '
    'convolutions and matrix products'
  )
  if kind == 'train':
    if program['xla_flops_per_image']:
      yield (
        f'{program["xla_flops_per_image"] / 1e9:,.2f} GFLOP per image in '
        'total, as counted by XLA'
      )
    share = program['aliased'] / program['outputs']
    yield f'{share:.2%} of the outputs reuse donated arguments'
  if not program['bytes_accessed']:  # XLA has no count of its own
    images = program.get('batch_size', result['batch_size'])
    yield from _kernels(program, images / result['num_devices'])
  if program['collectives']:
    yield from terminal.table(
      ['communication', 'in groups of', 'operations', 'bytes per chip'],
      [
        (
          one['kind'], str(one['group']), str(one['count']), f'{one["bytes"]:,}'
        )
        for one in program['collectives']
      ],
    )  # fmt: skip
  else:
    yield 'no communication between chips'
  yield f'compiled in {program["compile_seconds"]:.0f} s'


def _kernels(program, images):
  """The kinds of kernels, and what they move for each image."""
  kinds = program['kernels']
  whole = sum(kind['bytes'] for kind in kinds)
  yield (
    f'{program["kernel_bytes_per_image"] / 1e6:,.1f} MB per image are operands '
    f'and results of {sum(kind["count"] for kind in kinds):,} kernels'
  )
  yield from terminal.table(
    ['kernels', 'number', 'MB per image', 'share'],
    [
      (
        kind['name'],
        f'{kind["count"]:,}',
        f'{kind["bytes"] / images / 1e6:,.1f}',
        f'{kind["bytes"] / whole:.1%}',
      )
      for kind in kinds
    ],
  )


def _predicted(result):
  predicted = result['predicted']
  yield (
    'time per step at the published rates: '
    f'{1e3 * predicted["compute_seconds"]:.2f} ms of computation, '
    f'{1e3 * predicted["memory_seconds"]:.2f} ms of memory traffic, '
    f'{1e3 * predicted["exchange_seconds"]:.2f} ms of communication'
  )
  yield (
    f'{1e3 * predicted["seconds"]:.2f} ms if only computation and memory '
    f'overlap: {predicted["images_per_sec_per_chip"]:,.0f} images/s per chip, '
    f'{predicted["hours"]:.1f} hours for the run, efficiency '
    f'{predicted["efficiency"]:.0%}; the times are lower bounds: no chip '
    'reaches its published rates'
  )


def _measured(found):
  """The times measured on this machine."""

  def share(program):
    of_peak = program['share_of_peak']
    return f', {of_peak:.0%} of the published peak' if of_peak else ''

  train, sample = found['train'], found.get('sample')
  yield (
    f'measured: {train["seconds_per_step"]:.4g} s per training step, '
    f'{train["images_per_sec"]:,.4g} images/s, mean of {train["steps"]} '
    f'step{"s" * (train["steps"] > 1)}' + share(train)
  )
  if sample:
    yield (
      f'measured: {1 / sample["seconds_per_evaluation"]:,.4g} evaluations/s '
      f'while sampling, {sample["batch_size"]} images at once' + share(sample)
    )
