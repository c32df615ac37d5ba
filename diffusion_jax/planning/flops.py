"""Counts the FLOPs of a traced program's products exactly."""

import math
from collections import Counter

import numpy as np
from jax.extend import core


def products(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Counter:
  """FLOPs of convolutions and matrix products; a multiply-add counts as two.

  Products with a convolution's padding, or with the holes of a dilated one, are
  not counted: they are skipped, or multiply by zero. All other operations
  (norms, activations, the optimiser) are not counted; they are a few percent of
  a U-Net.

  Args:
    jaxpr: the whole program, over all devices, such as
      `jax.jit(f).trace(...).jaxpr`.

  Returns:
    {'convolutions': FLOPs, 'matrix products': FLOPs}.

  Raises:
    ValueError: a loop of unknown length contains products.
  """
  total = Counter({'convolutions': 0, 'matrix products': 0})
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if eqn.primitive.name == 'conv_general_dilated':
      total['convolutions'] += _convolution(eqn)
    elif eqn.primitive.name == 'dot_general':
      total['matrix products'] += _dot(eqn)
    else:
      for name, count in _inside(eqn).items():
        total[name] += count
  return total


def has_loops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> bool:
  """Whether a loop contains products; XLA counts a loop's body once."""
  return any(
    (eqn.primitive.name == 'scan' and products(inner).total() > 0)
    or has_loops(inner)
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns
    for inner in _called(eqn)
  )


def _called(eqn) -> list:
  return [
    value
    for entry in eqn.params.values()
    for value in (entry if isinstance(entry, tuple | list) else [entry])
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr)
  ]


def _inside(eqn) -> Counter:
  """The FLOPs of the programs that an equation calls."""
  found = [products(value) for value in _called(eqn)]
  if eqn.primitive.name == 'cond':
    return max(found, key=lambda count: count.total())
  total = sum(found, Counter())
  if eqn.primitive.name == 'while' and total.total():
    raise ValueError('a loop of unknown length contains products')
  times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
  return Counter({name: times * count for name, count in total.items()})


def _dot(eqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = eqn.invars[0].aval.shape
  depth = math.prod(left[axis] for axis in contracted)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * depth


def _convolution(eqn) -> int:
  image, kernel = (var.aval.shape for var in eqn.invars)
  out = eqn.outvars[0].aval.shape
  how = eqn.params
  (_, _, *over), (_, inner, *window), (rows, channels, *onto) = how[
    'dimension_numbers'
  ]
  taps = math.prod(
    _taps(image[i], kernel[k], out[o], *lies)
    for i, k, o, *lies in zip(
      over, window, onto, how['window_strides'], how['padding'],
      how['lhs_dilation'], how['rhs_dilation'], strict=True,
    )
  )  # fmt: skip
  return 2 * out[rows] * out[channels] * kernel[inner] * taps


def _taps(image, kernel, out, stride, padding, holes, dilation) -> int:
  """How often a tap of a window falls on an element, along one axis."""
  at = (
    np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - padding[0]
  )
  return int(
    np.sum((at >= 0) & (at <= (image - 1) * holes) & (at % holes == 0))
  )
