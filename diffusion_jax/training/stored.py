"""Reading of a checkpoint on disk, verified, with one-line errors."""

import contextlib
import errno
import logging
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from diffusion_jax import models
from diffusion_jax.models import NET
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum
from diffusion_jax.training.state import AVERAGE

# Keys in Orbax's metadata of a step.
SUMS = 'checksums'
FROZEN = 'frozen'
WHOLE = 'commit_success.txt'  # marks a complete checkpoint in a bucket
OUTSIDE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
STEP = re.compile('0|[1-9][0-9]*')  # the names that Orbax takes


class Damaged(UserError):
  """A checkpoint that cannot be read, as against one of another model.

  Attributes:
    what: the message without its remedy.
  """

  def __init__(self, what: str, remedy: str):
    super().__init__(f'{what}: {remedy}')
    self.what = what


def steps(directory) -> list[int]:
  """The steps that have a complete checkpoint, in order.

  Args:
    directory: the folder of the checkpoints; [] if it does not exist.
  """
  directory = files.at(directory)
  if not directory.is_dir():
    return []
  # An unfinished save has a longer name and is renamed at the end. In a bucket
  # it has its final name, and a file is added once it is complete.
  return sorted(
    int(entry.name)
    for entry in directory.iterdir()
    if STEP.fullmatch(entry.name)
    and ((entry / WHOLE).exists() if files.in_bucket(entry) else entry.is_dir())
  )


class Stored:
  """A checkpoint on disk; `tree` has the shapes and dtypes of its arrays.

  Args:
    checkpointer: Orbax's checkpointer of the directory.
    directory: the folder of the checkpoints.
    step: the step of the checkpoint.
    flag: the flag that selects another step, for the messages; '' if there is
      none, as in training.

  Raises:
    UserError: the checkpoint is damaged.
  """

  def __init__(self, checkpointer, directory, step, flag='step'):
    self._checkpointer = checkpointer
    self._directory, self._step, self._flag = directory, step, flag
    with self._reading():
      metadata = checkpointer.metadata(step)
      if metadata.metadata is None:
        raise ValueError('its metadata cannot be read')
      self.tree = metadata.metadata.get('state', metadata.metadata)
      self._sums = (metadata.custom_metadata or {}).get(SUMS)
      self._frozen = (metadata.custom_metadata or {}).get(FROZEN, {})
      if not isinstance(self._sums, dict):
        raise ValueError('it has no checksums')

  def __str__(self):
    return f'checkpoint {self._step} in {self._directory}'

  def part(self, ema: bool | str) -> str:
    """The name of the averaged parameters, if they were kept; or of the raw."""
    if isinstance(ema, str):
      return AVERAGE + ema
    return 'ema_params' if ema and self.tree.get('ema_params') else 'params'

  def has(self, parts) -> None:
    """Raises UserError if raw parameters are wanted and were never saved."""
    missing = 'params' in parts and 'params' not in self.tree
    if missing and 'ema_params' in self.tree:
      raise UserError(
        f'{self} was converted and has averaged parameters only: use those '
        '(ema=True, --ema or --init_ema)'
      )

  def trained_with(self, frozen: dict) -> None:
    """Raises UserError unless these are the frozen parts of the training."""
    for name in sorted(frozen.keys() | self._frozen.keys()):
      there, here = self._frozen.get(name, {}), frozen.get(name, {})
      if there.get(SUMS) != here.get(SUMS):
        raise UserError(
          f'{self} was trained with {there.get("from", "no part")} as its '
          f'frozen {name}, which is now {here.get("from", "missing")}: give '
          'the same one, or train in a new workdir'
        )

  def is_before_parts(self, abstract: dict) -> bool:
    """Whether it predates named parts: it has the network's parameters only."""
    return any(
      NET in abstract.get(name, {}) and NET not in self.tree.get(name, {NET: 0})
      for name in ('params', 'ema_params')
    )

  def load(self, abstract: dict) -> dict:
    """Loads the parts of `abstract`, which must match the checkpoint."""
    if self.is_before_parts(abstract):
      loaded = self.load(_without_parts(abstract))
      loaded = {name: loaded[name] for name in abstract}
      return jax.tree.structure(abstract).unflatten(jax.tree.leaves(loaded))
    self.has(abstract)
    stored = {name: self.tree.get(name, {}) for name in abstract}
    for row in models.differences(stored, abstract, _shape_and_dtype)[:1]:
      raise UserError(
        f'{self} holds another model: {row["name"]} is '
        f'{row["there"] or "nothing"} there, {row["here"] or "nothing"} here'
      )
    return self.read(abstract)

  def read(self, chosen: dict) -> dict:
    """Reads the chosen parts only, except for leaves that are `...`."""
    skipped = jax.tree.map(lambda _: ..., self.tree)
    with self._reading():
      loaded = self._checkpointer.load(self._step, {**skipped, **chosen})
      read = {
        n: leaf for n, leaf in models.named(loaded).items() if leaf is not ...
      }
      for name, found in checksum.of(read).items():
        if found != self._sums.get(name):
          raise ValueError(f'{name} is not what was saved')
    return loaded

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Reports in one line what is wrong with the checkpoint."""
    try:
      yield
    except Exception as e:
      hush()
      error = e
      while error.__cause__:  # the innermost has the reason
        error = error.__cause__
      if isinstance(error, OUTSIDE):
        raise error from None  # nothing is wrong with the checkpoint
      raise self._unreadable(error) from e

  def _unreadable(self, error) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    others = [s for s in steps(self._directory) if s != self._step]
    remedy = 'there is no other checkpoint'
    if others:
      remedy = (
        f'move {self._directory}/{self._step} away to resume from {others[-1]}'
      )
    if others and self._flag:
      remedy += (
        f', or choose another with --{self._flag} '
        f'({", ".join(map(str, others))})'
      )
    what = f'checkpoint {self._step} is unreadable ({reason[:120].strip()})'
    code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
    if code and int(code[1]) != errno.ENOENT:
      return UserError(f'{what}: {remedy}')  # a disk that fails
    return Damaged(what, remedy)


def hush() -> None:
  """Silences asyncio's messages about other tasks once one has failed."""
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)


def _without_parts(tree):
  """The layout of older checkpoints: the network's parameters, no parts."""

  def is_part(node):
    return isinstance(node, dict) and node.keys() == {NET}

  return jax.tree.map(
    lambda node: node[NET] if is_part(node) else node, tree, is_leaf=is_part
  )


def _shape_and_dtype(leaf) -> str:
  return f'{tuple(leaf.shape)} {jnp.dtype(leaf.dtype)}'
