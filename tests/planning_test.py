"""What a compiled program takes, against arithmetic of one's own."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import cifar10, digits
from diffusion_jax import runs
from diffusion_jax.models import layers
from diffusion_jax.planning import chips, compiled, flops, hlo, rates, slices
from diffusion_jax.planning.compiled import Compiled
from diffusion_jax.planning.hlo import Collective
from diffusion_jax.runs import programs
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

# --- FLOPs ------------------------------------------------------------------


def taps(size, stride=1):
  """Of a window of 3 along an axis, over all places: none on the padding."""
  return 3 * size - 2 if stride == 1 else 3 * (size // 2) - 1


def forward(config) -> tuple[int, int]:
  """(FLOPs of one image forward, of its first convolution), layer by layer.

  A layer of the network at a time, as the paper's appendix B lists them; a
  multiply-add is two.
  """
  model, size = config.model, config.data.image_size
  width, emb = model.channels, 4 * model.channels
  total = 2 * (width * emb + emb * emb)  # of the times

  def conv(size, inner, outer, stride=1):
    return 2 * taps(size, stride) ** 2 * inner * outer

  def block(size, inner, outer):
    flop = conv(size, inner, outer) + conv(size, outer, outer)
    flop += 2 * emb * outer
    flop += 2 * size**2 * inner * outer * (inner != outer)
    if size in model.attention_resolutions:
      flop += attention(size, outer)
    return flop

  def attention(size, width):
    places = size**2
    return 2 * places * width * 4 * width + 2 * 2 * places**2 * width

  first = conv(size, config.data.channels, width)
  total += first
  stack, inner = [width], width
  for level, times in enumerate(model.multipliers):
    for _ in range(model.num_blocks):
      total += block(size, inner, width * times)
      inner = width * times
      stack.append(inner)
    if level < len(model.multipliers) - 1:
      total += conv(size, inner, inner, stride=2)
      size //= 2
      stack.append(inner)
  resolutions, model.attention_resolutions = model.attention_resolutions, ()
  total += 2 * block(size, inner, inner) + attention(size, inner)
  model.attention_resolutions = resolutions
  for level, times in reversed(list(enumerate(model.multipliers))):
    for _ in range(model.num_blocks + 1):
      total += block(size, inner + stack.pop(), width * times)
      inner = width * times
    if level:
      size *= 2
      total += conv(size, inner, inner)
  assert not stack
  return total + conv(size, inner, config.data.channels), first


def traced(config, batch_size):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  program = programs.create(config, mesh)
  shape = (batch_size, *runs.image_shape(config.data))
  batch = {'image': jax.ShapeDtypeStruct(shape, jnp.uint8)}
  return program.step_fn.trace(program.abstract, program.frozen, batch)


@pytest.mark.parametrize(
  'name', ['digits', pytest.param('cifar10', marks=pytest.mark.slow)]
)
def test_flops_are_those_of_the_network(name):
  """Backward takes twice forward, but nobody asks for the image's gradient.

  XLA counts all the rest too, which is within 4%. Upsampling is the
  plain one, as the layers are listed.
  """
  config = {'digits': digits, 'cifar10': cifar10}[name].get_config()
  config.model.plain = layers.MEASURES
  step = traced(config, 16)
  once, first = forward(config)
  count = flops.products(step.jaxpr).total() / 16
  assert count == pytest.approx(3 * once - first, rel=1e-3)
  if name == 'cifar10':
    assert 11.6e9 < once < 11.64e9  # 12.44e9 with the padding
    whole = step.lower().cost_analysis()['flops'] / 16
    assert count < whole < 1.04 * count


@pytest.mark.slow
def test_flops_do_not_depend_on_microbatches():
  """What a loop does counts as often as it runs."""
  config = digits.get_config()
  config.model.multipliers, config.model.num_blocks = (1, 1), 1
  one = traced(config, 16).jaxpr
  config.microbatches = 4
  four = traced(config, 16).jaxpr
  assert flops.products(four) == flops.products(one)
  # XLA does not count so, and is not asked then.
  assert flops.has_loops(four)
  assert not flops.has_loops(one)


@pytest.mark.parametrize(
  ('stride', 'padding', 'holes', 'dilation'),
  [
    (1, 'SAME', 1, 1), (2, 'SAME', 1, 1), (1, 'VALID', 1, 2),
    (1, [(2, 1)], 2, 1), (2, [(0, 3)], 3, 2),
  ],
)  # fmt: skip
def test_taps_of_a_window_are_counted(stride, padding, holes, dilation):
  """Against a convolution of ones, whose sum is the number of products."""
  conv = functools.partial(
    jax.lax.conv_general_dilated, window_strides=[stride], padding=padding,
    lhs_dilation=[holes], rhs_dilation=[dilation],
  )  # fmt: skip
  image, kernel = jnp.ones((2, 3, 11)), jnp.ones((5, 3, 4))
  count = flops.products(jax.jit(conv).trace(image, kernel).jaxpr)
  assert count['convolutions'] == 2 * float(conv(image, kernel).sum())


def test_loops_of_unknown_length_are_refused():
  def endless(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  jaxpr = jax.jit(endless).trace(jnp.ones((2, 2))).jaxpr
  with pytest.raises(ValueError, match='unknown length'):
    flops.products(jaxpr)


# --- what XLA prints ----------------------------------------------------------

# As libtpu prints it, shortened.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input_0: bf16[8,64], input_1: bf16[16]) -> bf16[2,64] {
  %input_0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = (bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[16]{0}) all-reduce(%input_0, %input_1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[2,64] dynamic-slice(%all-reduce.7, %zero)
}

%async_collective_fusion.4 (p: f32[8]) -> f32[32] {
  %all-gather.9 = f32[32]{0} all-gather(%part), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%body.3 (p: (s32[], f32[32])) -> (s32[], f32[32]) {
  %all-gather.2 = f32[32]{0} all-gather(%part), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  %fusion.2 = f32[32]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.4
  %fusion.1 = bf16[2,64]{1,0} fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.1
}

%cond.3 (p: (s32[], f32[32])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[8]) -> f32[32] {
  %ag = (f32[8]{0}, f32[16]{0}) all-gather-start(%p0), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}
  %done = f32[16]{0} all-gather-done(%ag)
  %while.1 = (s32[], f32[32]) while(%t), condition=%cond.3, body=%body.3, backend_config={"known_trip_count":{"n":"5"}}
  %rs = f32[4]{0} reduce-scatter(%x), channel_id=6, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %permute = u8[10]{0} collective-permute(%y), channel_id=7, source_target_pairs={{0,1}}
}
"""  # noqa: E501


def test_collectives_of_a_text():
  assert set(hlo.collectives(TEXT, 8)) == {
    Collective('reduce-scatter', 4, 5, 5 * (8 * 64 + 16) * 2),
    Collective('all-gather', 4, 5, 5 * 32 * 4),
    Collective('all-gather', 2, 1, 16 * 4),
    Collective('reduce-scatter', 2, 1, 2 * 4 * 4),
    Collective('collective-permute', 2, 1, 10),
  }


@pytest.mark.parametrize(
  ('line', 'group', 'size'),
  [
    ('f32[5]{0} all-reduce(%x), replica_groups={}', 16, 20),
    ('pred[5]{0} all-reduce(%x), replica_groups={{0,1,2},{3,4,5}}', 3, 5),
    ('(f32[10]{0}, bf16[20]{0}) all-reduce-start(%x, %y), '
     'replica_groups=[2,8]<=[16]', 8, 80),
    ('((f32[2]{0}, f32[4]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start('
     "%x, %y), replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) "
     "{'b'}", 4, 96),
    ("f32[4]{0} reduce-scatter(%x), replica_groups=mesh['a'=16] "
     "{'a':(1)2}", 2, 32),
    ('(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), '
     'source_target_pairs={{1,0},{3,2}}', 2, 16),
  ],
)  # fmt: skip
def test_lines_as_several_compilers_print_them(line, group, size):
  text = f'ENTRY %main (x: f32[1]) -> f32[1] {{\n  %out = {line}\n}}\n'
  (found,) = hlo.collectives(text, 16)
  assert (found.group, found.bytes) == (group, size)


def test_a_compiled_program():
  """y = x + sum(x), x donated: one argument, its place, one reduction."""
  mesh = sharding.make_mesh()
  where = sharding.batch_sharding(mesh)
  fn = jax.jit(
    lambda x: x + jnp.tanh(x).sum(0, keepdims=True),
    donate_argnums=0,
    out_shardings=where,
  )
  x = jax.ShapeDtypeStruct((64, 1000), jnp.float32, sharding=where)
  program = compiled.compile(fn, (x,), 10**9)
  assert program.arguments == program.outputs == program.aliased == 32_000
  assert program.total == 32_000 + program.temporaries + program.code
  assert program.collectives == [Collective('all-reduce', 8, 1, 4000)]


@pytest.mark.parametrize(
  'message',
  [
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (38.50G) exceeds available HBM (15.75G).',
    'Ran out of memory in memory space hbm. Used 38.50G of 15.75G hbm.',
  ],
)
def test_what_libtpu_says_of_too_large_a_program(message):
  gib = 2**30
  assert compiled._exceeded(message) == (38.5 * gib, 15.75 * gib)
  assert compiled._exceeded('INTERNAL: something else') is None


# --- predictions ------------------------------------------------------------


def made_up(**changes):
  nothing = dict.fromkeys(Compiled._fields, 0) | {'collectives': []}
  return Compiled(**nothing | changes)


def test_time_at_published_rates():
  """A ring of 16: of each byte 15/16 are sent, twice for a sum."""
  where = slices.parse('v5e:16x16')
  program = made_up(
    flops=197e12, bytes_accessed=819e7,
    collectives=[
      Collective('all-reduce', 256, 1, int(200e9)),
      Collective('all-gather', 16, 1, int(100e9)),
    ],
  )  # fmt: skip
  found = rates.predict(where, program)
  assert found['compute_seconds'] == pytest.approx(1)
  assert found['memory_seconds'] == pytest.approx(0.01)
  exchange = 2 * 255 / 256 + 15 / 16
  assert found['exchange_seconds'] == pytest.approx(exchange)
  assert found['seconds'] == pytest.approx(1 + exchange)
  assert found['efficiency'] == pytest.approx(1 / (1 + exchange))
  # Without the links that close the rings it takes twice as long.
  small = rates.predict(slices.parse('v5e:8x8'), made_up(
    flops=1.0, collectives=[Collective('all-reduce', 64, 1, int(200e9))]
  ))  # fmt: skip
  assert small['exchange_seconds'] == pytest.approx(2 * 2 * 63 / 64)


@pytest.mark.parametrize('first', [1, 7, 100, 5000])
@pytest.mark.parametrize('bend', [0, 0.3])
def test_the_largest_batch_is_between_its_neighbours(first, bend):
  """Memory as a line, or one that bends; in few tries."""
  tries = collections.Counter()

  def used(count):
    tries[count] += 1
    return int(1000 + 7 * count ** (1 + bend)), 100_000

  fits, does_not = rates.largest(used, first)
  truth = next(c for c in itertools.count(1) if used(c)[0] > 100_000) - 1
  assert fits.count <= truth < does_not.count
  assert does_not.count - fits.count <= max(1, fits.count / 32)
  assert fits.used <= fits.limit == does_not.limit < does_not.used
  calls = tries.total() - truth - 1
  assert calls <= 9


def test_memory_that_falls_near_the_limit():
  """XLA computes things twice there, rather than keep them."""
  tries = []

  def used(count):
    tries.append(count)
    size = 1000 + 7 * count
    return (size if size < 90_000 else int(0.85 * size)), 100_000

  fits, does_not = rates.largest(used, 12_000)
  assert 0.95 * 16_664 < fits.count <= 16_664 < does_not.count
  assert max(tries) < 2.1 * 16_664
  assert len(tries) <= 9


def test_nothing_fits():
  fits, does_not = rates.largest(lambda count: (5000 + count, 100), 64)
  assert fits.count == 0
  assert does_not.count == 1


# --- chips ------------------------------------------------------------------


def test_slices():
  where = slices.parse('v4:2x2x4')
  assert (where.size, where.shape) == (16, (2, 2, 4))
  assert 30 * 2**30 < where.chip.memory < 32 * 2**30


@pytest.mark.parametrize(
  ('names', 'same'),
  [
    ('v5e-16 v5litepod-16 V5E-16 tpu-v5-lite-podslice-16', 'v5e:4x4'),
    ('v5e-8 v5litepod-8', 'v5e:2x4'),
    ('v5e-1', 'v5e:1x1'),
    ('v4-8', 'v4:2x2x1'),
    ('v4-32 tpu-v4-podslice:2x2x4', 'v4:2x2x4'),
    ('v5p-64 tpu-v5p-slice:2x4x4', 'v5p:2x4x4'),
    ('v6e-256 tpu-v6e-slice:16x16', 'v6e:16x16'),
  ],
)
def test_slices_have_several_names(names, same):
  for name in names.split():
    assert slices.parse(name) == slices.parse(same)
    assert slices.parse(name).name == same


@pytest.mark.parametrize(
  ('name', 'must'),
  [
    ('v9:2x2', 'v4, v5e, v5p, v6e'), ('v5e', 'have 2 axes, such as v5e:2x2'),
    ('v5e:2x2x2', 'have 2 axes'), ('v4:8', 'such as v4:2x2x2'),
    ('v5e:16x32', 'have at most 256'), ('v5e:0x4', 'have 2 axes'),
    ('v5e:axb', 'have 2 axes'), ('', 'v4, v5e'),
    ('v5e-12', 'only powers of two'), ('v4-9', 'give the sizes'),
    ('v5e-512', 'have at most 256'), ('h999-8', 'v4, v5e'),
  ],
)  # fmt: skip
def test_slices_that_there_are_not(name, must):
  with pytest.raises(UserError, match=f'--topology={name}: ') as error:
    slices.parse(name)
  assert must in str(error.value)
  assert '\n' not in str(error.value)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(slices.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'pip install .diffusion_jax\[tpu\]'):
    slices.devices(slices.parse('v5e:2x2'))


@pytest.mark.slow
def test_numbers_are_of_the_network_that_trains():
  """The tiny network of other tests is one that programs.create can make."""
  config = digits.get_config()
  config.model.update(channels=8, num_groups=4, num_blocks=1)
  mesh = sharding.make_mesh(2, 4, 1)
  program = programs.create(config, mesh)
  batch = sharding.put_batch(tiny.images(16), mesh)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
  )
  args = (program.abstract, program.frozen, abstract)
  found = compiled.compile(program.step_fn, args, 10**12)
  state = sum(
    np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(program.abstract)
  )
  image = 16 // 8 * 8 * 8
  assert found.arguments == pytest.approx(state + image, rel=0.01)
  assert found.aliased > 0.99 * found.outputs


def test_the_peak_of_a_device_by_its_name():
  """The names are those that JAX gives."""
  for kind, peak in (
    ('NVIDIA H200', 989.4e12),
    ('NVIDIA H100 80GB HBM3', 989.4e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('TPU v5 lite', 197e12),
    ('TPU v6e', 918e12),
    ('NVIDIA B200', 2250e12),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', None),
    ('NVIDIA H100 PCIe', None),
    ('NVIDIA H100 NVL', None),
    ('NVIDIA A100-PCIE-40GB', None),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
    ('NVIDIA RTX A1000', None),
    ('cpu', None),
  ):
    assert chips.peak(kind) == peak, kind
