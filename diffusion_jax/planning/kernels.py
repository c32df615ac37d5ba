"""The kernels of a compiled XLA program, and the bytes that each one moves."""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from diffusion_jax.planning import hlo

# Operations that move nothing. `-done` ends what `-start` has counted.
FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
  *('after-all', 'partition-id', 'replica-id', 'opt-barrier', 'domain'),
}
ENDINGS = ('-done', '-update')
CONTROL = {'while', 'conditional', 'call', 'async'}
# What a fusion is called, by the first of these that it contains.
CONTENTS = (
  ('convolution', 'fusion with a convolution'),
  ('dot', 'fusion with a product'),
  ('reduce', 'fusion with a reduction'),
  ('scatter', 'fusion with a scatter'),
  ('concatenate', 'fusion with a concatenation'),
)
# Part of the target of a custom call -> what it is called.
TARGETS = {
  'convBackwardInput': 'convolution, gradient of the input',
  'convBackwardFilter': 'convolution, gradient of the kernel',
  'conv': 'convolution',
  'cublas': 'matrix product',
  'fmha': 'attention',
}
SLICES = {'slice', 'dynamic-slice', 'gather'}
# A fusion computes these only where their result is used.
POINTWISE = {'bitcast', 'convert', 'copy', 'reshape', 'transpose', 'negate'}
# Operations that calculate nothing.
MOVES = (
  SLICES
  | POINTWISE - {'negate'}
  | {
    *('broadcast', 'concatenate', 'dynamic-update-slice', 'iota', 'pad'),
    'reverse',
  }
)
COPY = 'copy or conversion'
# On a TPU, S(1) is memory on the chip.
ON_CHIP = re.compile(r'\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}')


class Kernel(NamedTuple):
  """A kernel of a program on one device.

  Attributes:
    name: the instruction's name, which profiles show.
    kind: what it does, in words.
    source: path of the JAX operation in the traced program, or ''.
    shape: shape of the result as XLA prints it, without layouts.
    count: how often it runs per call of the program.
    bytes: bytes of its operands and results, each once.
  """

  name: str
  kind: str
  source: str
  shape: str
  count: int
  bytes: int

  @property
  def moved(self) -> int:
    """Bytes of all runs."""
    return self.count * self.bytes


class Group(NamedTuple):
  """Kernels that are alike: what they share, their number and all bytes."""

  name: str
  count: int
  bytes: int


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: its name.
    shape: shape of the result.
    op: the operation.
    operands: names of the operands.
    root: whether it is the computation's result.
    line: the whole line.
  """

  name: str
  shape: str
  op: str
  operands: list[str]
  root: bool
  line: str


def kernels(text: str) -> list[Kernel]:
  """The kernels of a compiled program, in the order in which they run.

  The bytes are what must cross the memory if nothing stays in a cache: each
  kernel reads its operands and writes its results once. Of an operand that is
  only sliced, the slice is read, and a result that is updated in place writes
  the update. Custom calls count like other kernels; XLA's own count leaves
  them out. Loops count once per iteration, or once if XLA does not know their
  length, and of a conditional the branch that moves most.

  Args:
    text: `compiled.as_text()`.
  """
  bodies, entry = hlo.computations(text)
  return _kernels(bodies, entry, 1)


def by_kind(found: Iterable[Kernel]) -> list[Group]:
  """Number and bytes of the kernels of each kind, most bytes first."""
  return _grouped((one.kind, one) for one in found)


def largest(found: Iterable[Kernel], most: int = 10) -> list[Group]:
  """The operations that move most: kernels of a kind, source and shape."""
  named = ((f'{one.kind}: {one.source} {one.shape}', one) for one in found)
  return _grouped(named)[:most]


def _grouped(named) -> list[Group]:
  groups = {}
  for name, one in named:
    before = groups.get(name, Group(name, 0, 0))
    groups[name] = Group(
      name, before.count + one.count, before.bytes + one.moved
    )
  return sorted(groups.values(), key=lambda group: -group.bytes)


def _kernels(bodies, name, times) -> list[Kernel]:
  """The kernels of a computation that runs so many times."""
  lines = parse(bodies[name])
  shapes = {one.name: one.shape for one in lines}
  # The result of an asynchronous operation is that of its end.
  ends = {
    one.operands[0]: one.shape for one in lines if one.op.endswith('-done')
  }
  found = []
  for one in lines:
    op = one.op.removesuffix('-start')
    if op in FREE or op.endswith(ENDINGS):
      continue
    inner = [body for body in hlo.called(one.line) if body in bodies]
    if op in CONTROL:
      often = times * (hlo.trips(one.line) or 1)
      each = [_kernels(bodies, body, often) for body in inner]
      if op == 'conditional':
        each = [max(each, key=lambda branch: sum(k.moved for k in branch))]
      found += itertools.chain.from_iterable(each)
      continue
    one = one._replace(op=op, shape=ends.get(one.name, one.shape), root=True)
    body = parse(bodies[inner[0]]) if op == 'fusion' else [one]
    source = re.search(r'op_name="([^"]*)"', one.line)
    found.append(Kernel(
      one.name, _kind(one, bodies, inner), source[1] if source else '',
      re.sub(r'\{[^}]*\}|/\*.*?\*/', '', one.shape), times,
      _moved(one, shapes, body),
    ))  # fmt: skip
  return found


def parse(lines: Iterable[str]) -> list[Instruction]:
  """The instructions of a computation."""
  found = []
  for line in lines:
    left, equals, rest = line.partition(' = ')
    if not equals:
      continue
    *root, name = left.split()
    end = _closing(rest) if rest.startswith('(') else rest.index(' ')
    op, _, given = rest[end:].strip().partition('(')
    operands = re.findall(r'%([\w.-]+)', given[: _closing('(' + given) - 1])
    found.append(Instruction(
      name.removeprefix('%'), rest[:end], op, operands, bool(root), line
    ))  # fmt: skip
  return found


def _closing(text) -> int:
  """Where the parenthesis that a text begins with has closed."""
  depth = 0
  for found in re.finditer(r'[()]', text):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  return len(text)


def _kind(one, bodies, inner) -> str:
  if one.op == 'custom-call':
    target = re.search(r'custom_call_target="([^"]*)"', one.line)[1]
    known = (words for part, words in TARGETS.items() if part in target)
    return next(known, target)
  if one.op != 'fusion':
    return COPY if one.op in MOVES else one.op
  ops = _ops(bodies, inner)
  found = (words for op, words in CONTENTS if op in ops)
  return next(found, 'elementwise fusion' if ops - MOVES - FREE else COPY)


def _ops(bodies, names) -> set[str]:
  """The operations in fusions, and in the fusions that they contain."""
  ops = set()
  for one in (one for name in names for one in parse(bodies[name])):
    within = [name for name in hlo.called(one.line) if name in bodies]
    ops |= _ops(bodies, within) if one.op == 'fusion' else {one.op}
  return ops


def _moved(one, shapes, body) -> int:
  """Bytes of an instruction's operands and results.

  Args:
    one: the instruction.
    shapes: name -> shape of the instructions beside it.
    body: the instructions of a fusion; of others the instruction itself.
  """
  by_name = {each.name: each for each in body}
  if one.op == 'fusion':
    inputs = {
      int(re.search(r'parameter\((\d+)\)', each.line)[1]): each.name
      for each in body
      if each.op == 'parameter'
    }
    names = [inputs.get(i, '') for i in range(len(one.operands))]
  else:
    names = one.operands
  read = 0
  for operand, name in dict(zip(one.operands, names, strict=True)).items():
    whole = _size(shapes.get(operand, ''))
    part = _part(name, body)
    read += whole if part is None else min(whole, part)
  return read + _written(one, body, by_name)


def _part(name, body) -> int | None:
  """Bytes of an operand that are read, if it is only sliced; otherwise None."""
  total = 0
  for user in (each for each in body if name in each.operands):
    first = user.operands[0] == name
    if user.op in SLICES and first:
      total += _size(user.shape)
    elif user.op == 'dynamic-update-slice' and first:
      continue  # updated in place
    elif user.op in POINTWISE and not user.root:
      inner = _part(user.name, body)
      if inner is None:
        return None
      total += inner
    else:
      return None
  return total


def _written(one, body, by_name) -> int:
  roots = [each for each in body if each.root]
  if one.op != 'fusion' or not roots:
    roots = [one]
  elif roots[0].op == 'tuple':
    roots = [by_name[name] for name in roots[0].operands if name in by_name]
  return sum(_result(root, by_name) for root in roots)


def _result(root, by_name) -> int:
  """Bytes that are written of a result: of an update in place, the update."""
  made = root
  while made.op == 'bitcast' and made.operands[0] in by_name:
    made = by_name[made.operands[0]]
  if made.op == 'dynamic-update-slice' and made.operands[1] in by_name:
    return _size(by_name[made.operands[1]].shape)
  return _size(root.shape)


def _size(shape) -> int:
  return sum(hlo.array_bytes(ON_CHIP.sub('', shape)))
