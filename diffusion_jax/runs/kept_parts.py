"""Parts of a run that are not trained, as files in its folder.

parts/NAME.safetensors   the parameters of the part, by their names
parts/NAME.json          {"from", "step", "ema", ...: where they come from,
                           "sha256": of the other file}
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh

from diffusion_jax import models
from diffusion_jax.system import distributed, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

FOLDER = 'parts'
SHA256, SEPARATOR, ORIGIN = 'sha256', '/', ('from', 'step')
AGAIN = 'copy the folder parts/ from a backup, or train in a new workdir'


class Frozen(NamedTuple):
  """The parts of a run that are not trained.

  Attributes:
    params: name -> parameters, on the devices.
    facts: name -> the content of its JSON file; without 'sha256' if the run
      has no copy yet, and without 'scaled_by' as long as shift and scale are
      not known.
  """

  params: dict[str, Any]
  facts: dict[str, dict]

  @property
  def origins(self) -> dict[str, str]:
    """Name -> where a part comes from, for messages."""
    return {
      name: ', step '.join(str(facts[x]) for x in ORIGIN if x in facts)
      for name, facts in self.facts.items()
    }


NONE = Frozen({}, {})


def read(workdir, abstract: Mapping, mesh: Mesh) -> Frozen:
  """Loads the frozen parts that a run has copied.

  Args:
    workdir: the run's folder.
    abstract: the shapes of the parts: name -> a tree.
    mesh: the devices to load them to.

  Raises:
    UserError: they are missing, damaged or of another structure.
  """
  params, facts = {}, {}
  for name, wanted in abstract.items():
    path = files.at(workdir) / FOLDER / f'{name}.safetensors'
    facts[name] = read_facts(workdir, name)
    if facts[name] is None:
      raise UserError(f'{path.with_suffix(".json")} is missing: {AGAIN}')
    content = files.content(path, AGAIN)
    if hashlib.sha256(content).hexdigest() != facts[name][SHA256]:
      raise UserError(f'{path} is not what was saved: {AGAIN}')
    tree = traverse_util.unflatten_dict(
      safetensors.numpy.load(content), sep=SEPARATOR
    )
    _check_structure({name: tree}, {name: wanted}, path)
    params[name] = sharding.placed(tree, mesh)
  return Frozen(params, facts)


def read_facts(workdir, name: str) -> dict | None:
  """Reads parts/NAME.json; None if there is no such file.

  Raises:
    UserError: the file is damaged.
  """
  path = files.at(workdir) / FOLDER / f'{name}.json'
  if not path.exists():
    return None
  try:
    facts = json.loads(path.read_text())
    if not {*ORIGIN, SHA256} <= facts.keys():
      raise ValueError('it holds something else')
    return facts
  except (OSError, ValueError, AttributeError) as e:
    raise UserError(f'{path} is unreadable ({e}): {AGAIN}') from e


def write(workdir, parts: Frozen) -> None:
  """Copies frozen parts into a run, unless they come from there.

  Call it in all processes.

  Args:
    workdir: the run's folder.
    parts: from `load`, with a shift and a scale.
  """
  for name, facts in parts.facts.items():
    if SHA256 in facts:
      continue
    tree = jax.tree.map(sharding.to_host, parts.params[name])
    content = safetensors.numpy.save(models.named(tree))
    there = files.at(workdir) / FOLDER

    def put(name=name, facts=facts, content=content, there=there):
      with files.replacing(files.make(there) / f'{name}.safetensors') as file:
        file.write(content)
      known = {**facts, SHA256: hashlib.sha256(content).hexdigest()}
      files.write_json(there / f'{name}.json', known)

    distributed.on_first(put)


def has_saved(workdir) -> bool:
  """Whether a run has a checkpoint: without one it may begin anew."""
  return bool(checkpoint.steps(files.at(workdir) / 'checkpoints'))


def is_copied(workdir, name: str, path, step: int = 0) -> bool:
  """Whether a run was trained with the part that its config names.

  Args:
    workdir: the run's folder.
    name: the part.
    path: where it comes from.
    step: the step of its checkpoint, 0 = any.
  """
  facts = read_facts(workdir, name)
  if facts is None or not has_saved(workdir):
    return False
  return facts['from'] == str(place(path)) and step in (0, facts['step'])


def place(path) -> files.Path:
  """A path that a config names, absolute."""
  return files.absolute(files.at(path).expanduser())


def _check_structure(tree, wanted, path) -> None:
  for row in models.differences(tree, wanted, lambda leaf: tuple(leaf.shape)):
    raise UserError(
      f'{path} holds another network than config.json: {row["name"]} is '
      f'{row["there"] or "missing"} there, {row["here"] or "missing"} in the '
      f'config: {AGAIN}'
    )
