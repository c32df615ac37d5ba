"""Whether a run is as healthy as a known one, and the usual suspects if not."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.reproduction import published

# How far a mean loss may be from the healthy run's, as a share of it. Chosen by
# hand, for lack of a second curve: a little less than what the healthy loss
# falls by from its first point to its last (6%). So it finds what is wrong in
# the recipe, and does not tell an early stage of a healthy run from a late one.
BAND = 0.05

# A row has the loss of one batch of 128. Between images it varies mostly with t
# (0.5 near t = 0, 0.001 near the end, by the paper's rates), so that one image
# has a standard deviation of twice the mean, a batch 18% of it, and the mean of
# 400 rows 0.9%: a fifth of the band. The error of the rows at hand is what
# decides: above QUIET of the band nothing is said.
NUM_ROWS = 400
QUIET = 0.25

# As a share, and two draws of 50,000 besides. Between runs nothing is known but
# that three retrains end within 2% of each other.
FID_BAND = 0.1

SUSPECTS = {
  'not finite': (
    'optim.lr too large, or optim.clip_norm 0',
    'no warm-up (optim.warmup_steps)',
    'a broken image in the data',
    'a device at fault: the same steps again, from the last checkpoint',
  ),
  'loss high': (
    'images not scaled to [-1, 1]',
    'the target: eps of the same xt, unweighted, mean over all pixels',
    't not as the network sees it: the integer 0 .. T - 1, not t / T',
    'another schedule than 1e-4 .. 0.02',
    'optim.lr, and the gradient clipped at 1 by its global norm',
    'the network: attention after each block at 16x16, group norm, dropout',
    'data in order, not shuffled',
  ),
  'loss low': (
    't not uniform: the first steps have the largest loss',
    'no dropout: it learns the images by heart, see the held-out loss',
    'fewer images than there should be, or many twice',
    'another schedule, with more noise at its start',
  ),
  'distance high': (
    f'the EMA first: without it the FID is about {published.WITHOUT_EMA}',
    'the reference: the training images, all of them (against the test images '
    f'{published.AGAINST_TEST} in place of 3.17)',
    'rounding: samples judged as floats, not as 8 bits',
    "the resize to 299: TensorFlow 1's, without half-pixel centres",
    "the weights of Inception: TensorFlow's of 2015-12-05",
    'the estimate of x0 clipped inside each step',
    'the grid: all T times, no noise after the last',
    'the variance: fixedlarge for CIFAR-10',
    'the count: fewer than 50,000 samples make it larger',
  ),
  'distance low': (
    'the reference: has it the samples in it, or other images?',
    'samples that are copies: see the nearest training images',
    'other features than the 2048 of Inception',
  ),
}


class Finding(NamedTuple):
  """How a number stands to the known one.

  Attributes:
    state: 'unknown', 'healthy', or a key of SUSPECTS.
    step: of the number.
    told: in a line.
  """

  state: str
  step: int
  told: str

  @property
  def suspects(self) -> tuple[str, ...]:
    """The likeliest first."""
    return SUSPECTS.get(self.state, ())

  def record(self) -> dict:
    """As JSON can hold it."""
    return {**self._asdict(), 'suspects': list(self.suspects)}


def at(curve: Sequence[tuple[int, float]], step: float) -> float:
  """A curve at a step, straight in the logarithm of the step.

  Args:
    curve: (step, value), by step.
    step: above 0.

  Returns:
    NaN before the first point, where nothing is known; behind the last one its
    value.
  """
  if not curve:
    return math.nan
  steps, values = zip(*curve, strict=True)
  if step < steps[0]:
    return math.nan
  return float(np.interp(np.log(step), np.log(steps), values))


def loss(rows: Sequence[dict], curve: Sequence[tuple[int, float]]) -> Finding:
  """The mean of the newest losses beside the healthy run's.

  It stands for the middle of the steps that it is of.

  Args:
    rows: of metrics.jsonl, by step.
    curve: (step, loss), by step; () = none to compare with.
  """
  newest = [row for row in rows if 'loss' in row][-NUM_ROWS:]
  if not newest:
    return Finding('unknown', 0, 'no loss so far')
  last = newest[-1]['step']
  losses = np.array([row['loss'] for row in newest])
  middle = round(np.mean([row['step'] for row in newest]))
  mean = losses.mean()
  told = f'step {last:,}: loss {mean:.4f}, mean of {len(newest)} rows'
  healthy = at(curve, middle)
  if math.isnan(healthy):
    return Finding('unknown', last, told + _before(curve))
  told += f' around step {middle:,}; healthy {healthy:.4f}'
  error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else 1
  if error > QUIET * BAND * healthy:
    told += f' (too noisy to tell: ± {error:.2g})'
    return Finding('unknown', last, told)
  state = _state(mean, healthy, BAND * healthy, 'loss')
  if state != 'healthy':
    told += f', {abs(mean / healthy - 1):.0%} too {state.split()[-1]}'
  return Finding(state, last, told)


def ended(message: str) -> Finding | None:
  """Of a run that training itself has ended, as a loss was not finite.

  Rows know nothing of it: no number that is not finite is written.

  Args:
    message: the last line of training.

  Returns:
    None where it ended by something else.
  """
  match = re.search(r'stopped: \w+ is (-?inf|nan) at step (\d+)', message)
  return match and Finding('not finite', int(match[2]), match[0])


def distance(
  step: int, fid: float, curve: Sequence[tuple[int, float]]
) -> Finding:
  """A FID beside the healthy run's; of the paper's protocol, or it says naught.

  Args:
    step: of the checkpoint.
    fid: of 50,000 samples of 1000 steps.
    curve: (step, FID), by step.
  """
  told, healthy = f'step {step:,}: FID {fid:.2f}', at(curve, step)
  if math.isnan(healthy):
    return Finding('unknown', step, told + _before(curve))
  width = FID_BAND * healthy + published.TWO_DRAWS
  told += f', healthy {healthy:.2f} ± {width:.2f}'
  return Finding(_state(fid, healthy, width, 'distance'), step, told)


def _before(curve) -> str:
  return f'; no curve is known before step {curve[0][0]:,}' if curve else ''


def _state(value, healthy, width, what) -> str:
  if abs(value - healthy) <= width:
    return 'healthy'
  return f'{what} {"high" if value > healthy else "low"}'


def told(findings: Sequence[Finding]) -> list[str]:
  """The findings, and below those outside a band the usual suspects.

  A distance that is high although the loss is healthy accuses what lies between
  them; where the loss is not healthy either, that comes first.

  Args:
    findings: of `loss` and `distance`.
  """
  lines = [one.told for one in findings]
  unwell = [one for one in findings if one.suspects]
  losses = [one for one in unwell if not one.state.startswith('distance')]
  for one in losses or unwell:
    lines.append(f'{one.state}; the usual suspects:')
    lines += [f'  {i}. {what}' for i, what in enumerate(one.suspects, 1)]
  return lines
