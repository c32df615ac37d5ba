"""A sampler as one file of jax.export, which draws without this package.

The weights are in the file: it is complete, and no second file can be that of
another step. They are constants behind a barrier, so that XLA neither folds nor
copies what is computed from them, and compiles what it does for `sample`.

Such a file is a program (StableHLO). Whoever calls it runs it.
"""

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from diffusion_jax import runs
from diffusion_jax.models import attention
from diffusion_jax.runs import draw, prompts
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files, numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

PLATFORMS = ('cpu', 'cuda', 'tpu')
LARGEST = 2**31 - 2**27  # bytes of weights: a file of jax.export ends at 2 GiB
GROUP = 16  # images drawn at once
DRAW = """\
import jax.export
import numpy as np

with open({name!r}, 'rb') as file:
  sampler = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
seed, index = np.uint32(0), np.arange(16, dtype=np.uint32)
images, finite = sampler({arguments})
assert finite  # otherwise black or white pixels hide what is not a number
np.save('images.npy', images)  # {dtype} [16, {shape}]
"""


class Written(NamedTuple):
  """A sampler that is exported.

  Attributes:
    content: the bytes of the file.
    facts: what a caller must know, for the JSON beside it.
  """

  content: bytes
  facts: dict


def check(path) -> None:
  """Raises UserError if a sampler cannot be written there, whatever the run.

  Args:
    path: the file, as it was given.
  """
  runs.usable_file('export', path)
  if files.at(path).expanduser().exists():
    raise UserError(f'--export={path} exists: give a new file, or remove it')
  if importlib.util.find_spec('flatbuffers') is None:
    raise UserError(
      f'--export={path} needs one more package: pip install flatbuffers'
    )


def _check_size(params) -> None:
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if size > LARGEST:
    raise UserError(
      f'--export: the weights take {size / 2**30:.1f} GiB, and a file of '
      f'jax.export at most {LARGEST / 2**30:.1f}: export a smaller network, or '
      'write the weights with python -m diffusion_jax.convert'
    )


@numerics.fixed()
def create(trained, plan: Plan, name: str, group: int = GROUP) -> Written:
  """Exports the sampler of a plan.

  Its arguments are the seed, uint32 [], the indices of the samples, uint32 [b]
  for any b, and, if the plan leaves the labels to chance, `label`, int32 [b].
  It returns (images [b, H, W, C], whether all were finite before rounding). The
  noise of a sample is that of (seed, index) in `Trained.sample`.

  Args:
    trained: the network, a `Trained`.
    plan: the plan; its seed is an argument.
    name: the name of the file, for the text that shows how to draw.
    group: images that the network draws at once; more are drawn in turn.

  Raises:
    UserError: the weights are larger than such a file can be.
  """
  _check_size(trained.all_params)
  held = jax.tree.map(sharding.to_host, trained.all_params)
  how, texts = prompts.tables(trained.workdir, trained.config, plan)
  sized = trained.sized(plan.image_size)
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  others = {key: one.recipe for key, one in sized.guides.items()}
  asks = plan.condition.get('label') == 'data'

  def call(seed, *rows):
    params = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, held))
    drawer = draw.drawer(sized.recipe, mesh, how._replace(seed=seed), **others)

    def some(part):
      index, *label = part
      told = {'label': label[0]} if asks else None
      return drawer(params, index, told, texts)

    images, finite = jax.lax.map(some, _grouped(rows, group))
    joined = images.reshape(-1, *images.shape[2:])
    return joined[: rows[0].shape[0]], finite.all()

  (batch,) = export.symbolic_shape('b')
  given = [
    jax.ShapeDtypeStruct((), np.uint32),
    jax.ShapeDtypeStruct((batch,), np.uint32),
    *[jax.ShapeDtypeStruct((batch,), np.int32)] * asks,
  ]
  # A program for several platforms has the kernels of none.
  with attention.plain():
    made = export.export(jax.jit(call), platforms=PLATFORMS)(*given)
  images = made.out_avals[0]
  shape = ', '.join(map(str, images.shape[1:]))
  names = ['seed', 'index', 'label'][: len(given)]
  classes = sized.recipe.conditioner.doors.get('label')
  shown = ['seed', 'index', f'np.int32(index % {classes})'][: len(given)]
  facts = {
    'platforms': list(made.platforms),
    'arguments': {
      key: f'{one.dtype.name} {str(one.shape).replace(",)", ")")}'
      for key, one in zip(names, given, strict=True)
    },
    'drawn_at_once': group,
    'returns': f'{images.dtype.name} (b, {shape}), and whether all are finite',
    'calling_convention': made.calling_convention_version,
    'how_to_draw': DRAW.format(
      name=name, arguments=', '.join(shown), dtype=images.dtype.name,
      shape=shape,
    ).splitlines(),
  }  # fmt: skip
  return Written(bytes(made.serialize()), facts)


def _grouped(rows, group: int) -> list[jax.Array]:
  """Arrays [b, ...] -> [groups, group, ...], filled up with repeats.

  The number of rows b may be a symbol, which the network's code cannot take.
  """
  count = rows[0].shape[0]
  groups = (count + group - 1) // group
  chosen = jnp.arange(groups * group).reshape(groups, group) % count
  return [row[chosen] for row in rows]


def write(path, written: Written, protocol: dict) -> files.Path:
  """Writes the file, and the JSON beside it, which is returned.

  Args:
    path: the file.
    written: the sampler.
    protocol: what the samples of the plan depend on. What is an argument of
      the program is left out.
  """
  left = {'seed'}
  if 'label' in written.facts['arguments']:
    left |= {'label', 'label_counts'}
  protocol = {k: x for k, x in protocol.items() if k not in left}
  path = files.at(path).expanduser()
  beside = path.with_name(f'{path.name}.json')
  files.make(path.parent)
  with files.replacing(path) as file:
    file.write(written.content)
  files.write_json(beside, {**written.facts, 'protocol': protocol})
  return beside
