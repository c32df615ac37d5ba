"""DDPM's original TensorFlow 1 checkpoints, as published by its authors.

A checkpoint consists of three files,
model.ckpt-790000.{index,data-00000-of-00001,meta}, and is named by their common
prefix. For each variable of the network, model/..., it also holds its average,
model/.../ExponentialMovingAverage, which the paper samples from, and Adam's
moments. It holds neither the image size nor the numbers of groups and heads;
those come from a config.

Reading them needs TensorFlow: pip install 'diffusion_jax[prepare]'. Only this
and the preparation of data sets need it.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax import models
from diffusion_jax.system import errors, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import named

SCOPE = 'model/'
AVERAGE = '/ExponentialMovingAverage'

# Our names -> theirs; each rule is applied to the result of those above it.
_RENAMED = (
  (r'^(down|up)/(\d+)/blocks/', r'\1_\2/block_'),
  (r'^(down|up)/(\d+)/attentions/', r'\1_\2/attn_'),
  (r'^(down|up)/(\d+)/resample', r'\1_\2/\1sample'),
  (r'^middle_attention', r'mid/attn_1'),
  (r'^middle([12])', r'mid/block_\1'),
  (r'^time([12])', lambda m: f'temb/dense{int(m[1]) - 1}'),
  (r'(block_\d+)/time/', r'\1/temb_proj/'),
  (r'(block_\d+)/shortcut/', r'\1/nin_shortcut/'),
  (r'(attn_\d+)/(q|k|v)(?:uery|ey|alue)/', r'\1/\2/'),
  (r'(attn_\d+)/out/', r'\1/proj_out/'),
  (r'(norm\d?|norm_out)/scale$', r'\1/gamma'),
  (r'(norm\d?|norm_out)/bias$', r'\1/beta'),
  (r'/kernel$', r'/W'),
  (r'/bias$', r'/b'),
)


class Checkpoint(NamedTuple):
  """The network's parameters in a checkpoint.

  Attributes:
    average: name, without scope and suffix -> averaged parameter.
    raw: the same for the raw parameters.
    step: the training step, or None if the file name does not have it.
  """

  average: dict[str, np.ndarray]
  raw: dict[str, np.ndarray]
  step: int | None


def is_checkpoint(path) -> bool:
  """Whether a checkpoint with this prefix exists."""
  path = files.at(path)
  return path.with_name(path.name + '.index').is_file()


def read(path) -> Checkpoint:
  """Reads a checkpoint.

  Args:
    path: the common prefix of its files, .../model.ckpt-790000.

  Raises:
    UserError: TensorFlow is not installed, the files are damaged, or they do
      not hold a DDPM network.
  """
  if not importlib.util.find_spec('tensorflow'):
    raise UserError(
      f'{path} needs TensorFlow to be read: pip install '
      "'diffusion_jax[prepare]', here or on another machine"
    )
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import tensorflow

  # TensorFlow's errors have no common class.
  with errors.one_line(f'{path} is damaged (', '): download it again'):
    reader = tensorflow.train.load_checkpoint(str(path))
    names = set(reader.get_variable_to_shape_map())
    ours = {
      name.removesuffix(AVERAGE)
      for name in names
      if name.startswith(SCOPE) and name.endswith(AVERAGE)
    }
    average, raw = (
      {
        name.removeprefix(SCOPE): reader.get_tensor(name + suffix)
        for name in ours
        if name + suffix in names
      }
      for suffix in (AVERAGE, '')
    )
  if not average:
    raise UserError(
      f'{path} holds no {SCOPE}...{AVERAGE}: it is not a DDPM checkpoint'
    )
  step = re.search(r'-(\d+)$', str(path))
  return Checkpoint(average, raw, int(step[1]) if step else None)


def to_params(tensors: Mapping[str, np.ndarray], abstract, what: str) -> dict:
  """Converts the tensors of a checkpoint to our parameters.

  Args:
    tensors: the average or raw parameters of a `Checkpoint`.
    abstract: our parameters' shapes.
    what: where the tensors come from, for the message.

  Raises:
    UserError: tensors are missing, left over, or of another shape; the message
      names them.
  """
  depth = 1 + max(
    int(name.split('/')[1])
    for name in models.names(abstract)
    if name.startswith('up/')
  )
  name_in = functools.partial(name_of, depth=depth)
  # Kernels have our layout: HWIO, and [inputs, outputs].
  return named.place(tensors, abstract, name_in, lambda _, x: x, what)


def name_of(name: str, depth: int) -> str:
  """Our name of a parameter -> theirs, without scope.

  Args:
    name: our name, such as up/0/blocks/1/conv1/kernel.
    depth: the number of levels; theirs are numbered from full resolution on the
      way up, too.
  """

  def level(match):
    return f'up/{depth - 1 - int(match[1])}/'

  return named.renamed(name, ((r'^up/(\d+)/', level), *_RENAMED))
