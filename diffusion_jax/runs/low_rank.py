"""Runs that train low-rank changes (LoRA) of another run's network.

What the config's network would train without LoRA is frozen: the run copies it
from the run that --init_from names when it begins, see `kept_parts`, and trains
the part `lora` alone. parts/net.json also says whether diffusers has the
projections around transformers as dense layers ("linear_projection").
"""

import hashlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from diffusion_jax import models, runs
from diffusion_jax.models import NET, lora
from diffusion_jax.runs import averaged, kept_parts, recipe
from diffusion_jax.runs.kept_parts import Frozen
from diffusion_jax.system import distributed, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding
from diffusion_jax.weights import lora as weights

LINEAR = 'linear_projection'


def is_used(config: Mapping) -> bool:
  """Whether a run trains low-rank changes, and not a network."""
  return config['lora']['rank'] > 0


def plain(config: Mapping) -> dict:
  """The config of a run whose network has the changes in it.

  Args:
    config: a run's config.
  """
  return {**config, 'lora': {**config['lora'], 'rank': 0}}


def shapes(config: Mapping) -> tuple[dict, dict]:
  """The shapes of the trained and of the frozen parts of LoRA.

  Args:
    config: a run's config, completed.

  Raises:
    UserError: lora.layers or lora.rank do not fit the network.
  """
  made = recipe.create(config)
  own = jax.eval_shape(made.init, jax.random.key(0))
  return own, {name: made.frozen[name] for name in made.adapted.parts}


def load(config: Mapping, mesh: Mesh, workdir=None, origin=None) -> Frozen:
  """Loads the frozen network for a start of a run; NONE for a run without LoRA.

  Call it in all processes. A run that has saved a checkpoint has a copy.

  Args:
    config: the run's config, completed.
    mesh: the devices to load it to.
    workdir: the run's folder, new or existing, or None.
    origin: the run that it comes from, see `finetune.find`.

  Raises:
    UserError: there is no other run, or it has another network; or the copy is
      missing or damaged.
  """
  if not is_used(config):
    return kept_parts.NONE
  _, wanted = shapes(config)
  if workdir and kept_parts.has_saved(workdir):
    return kept_parts.read(workdir, wanted, mesh)
  if origin is None:
    raise UserError(
      f'lora.rank={config["lora"]["rank"]} trains changes of a network that '
      'another run has trained: give that run, --init_from=RUN'
    )
  facts = origin._asdict()
  told = {'from': facts.pop('workdir'), **facts}
  found, left = common(told['from'], told['step'], told['ema'], wanted, mesh)
  for row in left:
    if row['here']:
      raise UserError(
        f'--init_from={told["from"]} has another network than the config: '
        f'{row["name"]} is {row["there"] or "missing"} there, {row["here"]} '
        "here: give the run's own config, as --config=RUN/config.json"
      )
  params = {
    name: jax.tree.structure(tree).unflatten(
      found[f'{name}/{one}'] for one in models.names(tree)
    )
    for name, tree in wanted.items()
  }
  told[LINEAR] = distributed.on_first(lambda: _has_dense(told['from']))
  return Frozen(params, dict.fromkeys(params, told))


def common(
  workdir, step: int, ema: bool, abstract: Mapping, mesh: Mesh
) -> tuple[dict, list[dict]]:
  """The parameters that a run has in common with another network.

  Those of a run with LoRA are those of its network with the changes in it.

  Args:
    workdir: the run's folder.
    step: the step of its checkpoint.
    ema: whether to take the averaged or the raw parameters.
    abstract: the other parameters or their shapes: part -> a tree.
    mesh: the devices to load them to.

  Returns:
    see `checkpoint.load_common`.

  Raises:
    UserError: as for `checkpoint.load_common`.
  """
  config, directory = runs.read_config(workdir), _checkpoints(workdir)
  wanted = sharding.abstract(abstract, mesh)
  if not is_used(config):
    return checkpoint.load_common(directory, step, wanted, ema=ema)
  own, _ = shapes(config)
  params = checkpoint.load_params(
    directory, step, sharding.abstract(own, mesh), ema=ema
  )
  there, _ = whole(workdir, config, params, mesh)
  left = models.differences(there, wanted, lambda leaf: tuple(leaf.shape))
  apart = {row['name'] for row in left}
  named = models.named(there)
  return {name: named[name] for name in named if name not in apart}, left


def whole(
  workdir, config: Mapping, params: Mapping, mesh: Mesh
) -> tuple[Mapping, str]:
  """The trained parts of a run; with LoRA, its network with the changes.

  Args:
    workdir: the run's folder.
    config: its config.
    params: what a checkpoint holds.
    mesh: the devices that hold it.

  Returns:
    (the parts, a hash of all copied parts and of the changes, or ''). Merged
    numbers are rounded, perhaps otherwise on other devices, and not hashed.

  Raises:
    UserError: the copy of the network is missing or damaged.
  """
  if not is_used(config):
    return params, ''
  made = recipe.create(config)
  wanted = {name: made.frozen[name] for name in made.adapted.parts}
  base = kept_parts.read(workdir, wanted, mesh)
  changes = lora.of(params[lora.PART], recipe.factor(config))
  digests = [
    kept_parts.read_facts(workdir, name)[kept_parts.SHA256]
    for name in sorted(made.frozen)
  ]
  digests.append(weights.sha256(on_host(changes)))
  return merged(base.params, changes, 1.0), joined(digests)


def merged(params: Mapping, changes: lora.Lora, scale: float) -> dict:
  """The parameters of a run with low-rank changes of its network.

  Args:
    params: all parts, on the devices.
    changes: what is added.
    scale: a factor on all changes.
  """
  before = params[NET]
  net = lora.merged(before, changes, scale)
  # Where the parameters lie; XLA may have chosen otherwise.
  where = jax.tree.map(lambda leaf: leaf.sharding, before)
  return {**params, NET: jax.device_put(net, where)}


def joined(digests: list[str]) -> str:
  """The hash of hashes."""
  return hashlib.sha256(' '.join(digests).encode()).hexdigest()


def on_host(changes: lora.Lora) -> lora.Lora:
  """Low-rank changes as NumPy's arrays, in every process."""
  return changes._replace(pairs=jax.tree.map(sharding.to_host, changes.pairs))


def read(
  workdir,
  step: int | None = None,
  ema: bool = True,
  ema_profile: str | float | None = None,
) -> tuple[lora.Lora, int, dict]:
  """The low-rank changes that a run has trained, on the host.

  Args:
    workdir: the run's folder.
    step: the step of the checkpoint; by default the newest that is not damaged.
    ema: whether to take the averaged or the raw parameters.
    ema_profile: another average, see `averaged.load`.

  Returns:
    (the changes, the step, facts about the average).

  Raises:
    UserError: there is no such checkpoint or average, or it is damaged.
  """
  config, directory = runs.read_config(workdir), _checkpoints(workdir)
  average = averaged.check(config['ema'], ema, ema_profile)
  which = average.get('ema_profile') or ema
  own, _ = shapes(config)
  abstract = sharding.abstract(own, sharding.make_mesh())

  def load_at(at):
    found = averaged.load(directory, at, abstract, config['ema'], which)
    return *found, at

  if step is None:
    params, facts, at = checkpoint.read_newest(directory, load_at)
  else:
    params, facts, at = load_at(checkpoint.find_step(directory, step))
  changes = lora.of(params[lora.PART], recipe.factor(config))
  return on_host(changes), at, facts


def names_of(workdir) -> weights.Names:
  """The names of the layers of a run with LoRA in files."""
  facts = kept_parts.read_facts(workdir, NET) or {}
  network = runs.read_config(workdir)['model']['name']
  return weights.names_of(network, facts.get(LINEAR, True))


def _has_dense(workdir) -> bool:
  """Whether diffusers has projections as dense layers, for a run's network."""
  if facts := kept_parts.read_facts(workdir, NET):
    return facts.get(LINEAR, True)
  kept = (runs.conversion(workdir) or {}).get('settings') or {}
  if 'unet' not in kept:
    return True  # as our own networks are exported
  return bool(kept['unet'].get('use_linear_projection', False))


def _checkpoints(workdir) -> files.Path:
  return files.at(workdir) / 'checkpoints'


def told(config: Mapping) -> str:
  """What a run with LoRA trains, in words."""
  own, fixed = shapes(config)
  layers = len(models.named(own)) // 2
  return (
    f'{models.count(own):,} numbers in {layers} layers are trained (LoRA '
    f'of rank {config["lora"]["rank"]}), and {models.count(fixed):,} are not'
  )
