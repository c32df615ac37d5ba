"""What the compiled training step does, and what it leaves alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax.training import loop, metrics, sharding

# Sums, exponentials and roots lose most in bfloat16. Softmax, the statistics of
# norms and the loss consist of them.
DELICATE = {'exp', 'log', 'rsqrt', 'sqrt', 'integer_pow', 'square', 'cumsum'}


@pytest.fixture(scope='module')
def step():
  """(abstract state, traced step, compiled step) with a bfloat16 network."""
  mesh = tiny.one_device()
  network = tiny.model(
    dtype='bfloat16', multipliers=(1,), attention_resolutions=(8,)
  )
  abstract, step_fn = tiny.program(mesh, network=network)
  rows = sharding.batch_sharding(mesh)
  images = jax.ShapeDtypeStruct(
    (tiny.BATCH, *tiny.SHAPE), jnp.uint8, sharding=rows
  )
  traced = step_fn.trace(abstract, {'image': images})
  return abstract, traced, traced.lower().compile()


def equations(jaxpr):
  """All equations, also those of the programs that it calls."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    yield eqn
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
        yield from equations(value)


def test_a_bfloat16_network_leaves_the_rest_in_float32(step):
  abstract, traced, _ = step
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract)}
  assert dtypes == {jnp.dtype('float32'), jnp.dtype('int32')}
  found = list(equations(traced.jaxpr))
  halves = {
    eqn.primitive.name
    for eqn in found
    if any(
      getattr(var.aval, 'dtype', None) == jnp.bfloat16 for var in eqn.invars
    )
  }
  assert 'conv_general_dilated' in halves  # the network's products are
  assert not halves & DELICATE
  outputs = jax.tree.leaves(traced.out_info[1])
  assert {leaf.dtype for leaf in outputs} == {jnp.dtype('float32')}


def test_the_step_calls_no_python(step):
  _, traced, compiled = step
  names = {eqn.primitive.name for eqn in equations(traced.jaxpr)}
  assert not [name for name in names if 'callback' in name or 'feed' in name]
  text = compiled.as_text()
  assert 'callback' not in text
  assert 'outfeed' not in text


def test_the_whole_state_is_updated_in_place(step):
  abstract, _, compiled = step
  state = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
  )
  assert compiled.memory_analysis().alias_size_in_bytes == state


def test_the_host_reads_only_when_a_row_is_due(tmp_path, monkeypatch):
  """Otherwise it would wait for the device in every step."""
  mesh, get, reads = tiny.one_device(), jax.device_get, []
  state, step_fn, batch = tiny.run(mesh, network=tiny.dense())
  dispatched = 0

  def counted(tree):
    nonlocal dispatched
    dispatched += 1
    with jax.transfer_guard('disallow'):
      return step_fn(tree, batch)

  def reading(tree):
    reads.append(dispatched)
    with jax.transfer_guard_device_to_host('allow'):
      return get(tree)

  class Kept:
    directory = tmp_path / 'checkpoints'

    def save(self, step, state):
      pass

    def wait(self):
      pass

  def train(state):
    nonlocal dispatched
    dispatched = int(state.step)
    writer = metrics.Writer(tmp_path, 0)
    monkeypatch.setattr(loop.jax, 'device_get', reading)
    with jax.transfer_guard_device_to_host('disallow_explicit'):
      loop.train(
        state, step_fn=lambda now, _: counted(now),
        batches=itertools.repeat(None), num_steps=12, batch_size=tiny.BATCH,
        every=loop.Every(log=5), checkpoints=Kept(), writer=writer,
      )  # fmt: skip
    writer.close()

  train(state)
  # One step after rows 5 and 10, and at the end.
  assert reads == [6, 11, 12]
  assert [row['step'] for row in metrics.read(tmp_path / 'metrics.jsonl')] == [
    5, 10,
  ]  # fmt: skip


@pytest.mark.slow
def test_bfloat16_trains_as_float32_does(tmp_path):
  means = {}
  for dtype in ('float32', 'bfloat16'):
    values = {
      'model.dtype': dtype, 'num_steps': 500, 'log_every': 1,
      'eval_every': 0, 'sample_every': 0, 'checkpoint_every': 500,
    }  # fmt: skip
    arguments = [f'--config.{key}={value}' for key, value in values.items()]
    workdir = tmp_path / dtype
    done = tiny.binaries.run(
      'train', '--config=digits', f'--workdir={workdir}', *arguments,
      JAX_DISABLE_MOST_OPTIMIZATIONS='False',
    )  # fmt: skip
    assert done.code == 0, done.err
    losses = tiny.losses(workdir)
    means[dtype] = np.mean([losses[step] for step in range(401, 501)])
  assert means['bfloat16'] == pytest.approx(means['float32'], rel=0.01)
