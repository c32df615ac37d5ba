"""Compares a run with a known healthy one; lists likely causes of trouble."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.reproduction import published

# Allowed deviation of a mean loss from the healthy run's, as a share of it.
# Chosen by hand, for lack of a second curve: a little less than the decrease of
# the healthy loss from its first point to its last (6%). It detects mistakes in
# the recipe, but does not distinguish early and late stages of a healthy run.
BAND = 0.05

# A row has the loss of one batch of 128. Between images it varies mostly with t
# (0.5 near t = 0, 0.001 near the end, by the paper's rates), so the standard
# deviation is twice the mean for one image, 18% of it for a batch, and 0.9% for
# the mean of 400 rows: a fifth of the band. If the error of the actual rows is
# above QUIET of the band, there is no finding.
NUM_ROWS = 400
QUIET = 0.25

# As a share, in addition to the difference of two draws of 50,000. All that is
# known about differences between runs is that three retrains end within 2% of
# each other.
FID_BAND = 0.1

SUSPECTS = {
  'not finite': (
    'optim.lr too large, or optim.clip_norm 0',
    'no warm-up (optim.warmup_steps)',
    'a broken image in the data',
    'a faulty device: repeat the same steps from the last checkpoint',
  ),
  'loss high': (
    'images not scaled to [-1, 1]',
    'the target: eps of the same xt, unweighted, mean over all pixels',
    'wrong t for the network: it must be the integer 0 .. T - 1, not t / T',
    'a schedule other than 1e-4 .. 0.02',
    'optim.lr, and the gradient clipped at 1 by its global norm',
    'the network: attention after each block at 16x16, group norm, dropout',
    'data that are not shuffled',
  ),
  'loss low': (
    't not uniform: the first steps have the largest loss',
    'no dropout: the network memorises the images, see the held-out loss',
    'too few images, or many duplicates',
    'a schedule with more noise at its start',
  ),
  'distance high': (
    f'the EMA first: without it the FID is about {published.WITHOUT_EMA}',
    'the reference: it must be all training images (against the test images '
    f'the FID is {published.AGAINST_TEST} instead of 3.17)',
    'rounding: samples must be judged as floats, not as 8 bits',
    "the resize to 299: TensorFlow 1's, without half-pixel centres",
    "the weights of Inception: TensorFlow's of 2015-12-05",
    'the estimate of x0 clipped inside each step',
    'the grid: all T times, no noise after the last',
    'the variance: fixedlarge for CIFAR-10',
    'the count: fewer than 50,000 samples make it larger',
  ),
  'distance low': (
    'the reference: does it contain the samples, or other images?',
    'samples that are copies: see the nearest training images',
    'features other than the 2048 of Inception',
  ),
}


class Finding(NamedTuple):
  """The comparison of a number with the known one.

  Attributes:
    state: 'unknown', 'healthy', or a key of SUSPECTS.
    step: the step of the number.
    told: the comparison in one line.
  """

  state: str
  step: int
  told: str

  @property
  def suspects(self) -> tuple[str, ...]:
    """Possible causes, the most likely first."""
    return SUSPECTS.get(self.state, ())

  def record(self) -> dict:
    """The finding as JSON."""
    return {**self._asdict(), 'suspects': list(self.suspects)}


def at(curve: Sequence[tuple[int, float]], step: float) -> float:
  """A curve at a step, interpolated linearly in the logarithm of the step.

  Args:
    curve: (step, value), by step.
    step: above 0.

  Returns:
    the value; NaN before the first point, and constant after the last.
  """
  if not curve:
    return math.nan
  steps, values = zip(*curve, strict=True)
  return float(np.interp(np.log(step), np.log(steps), values, left=math.nan))


def loss(rows: Sequence[dict], curve: Sequence[tuple[int, float]]) -> Finding:
  """Compares the mean of the newest losses with the healthy run's.

  The mean is compared at the middle of its steps.

  Args:
    rows: rows of metrics.jsonl, by step.
    curve: (step, loss), by step; () if there is nothing to compare with.
  """
  newest = [row for row in rows if 'loss' in row][-NUM_ROWS:]
  if not newest:
    return Finding('unknown', 0, 'no loss yet')
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
    told += f' (too noisy to compare: ± {error:.2g})'
    return Finding('unknown', last, told)
  state = _state(mean, healthy, BAND * healthy, 'loss')
  if state != 'healthy':
    told += f', {abs(mean / healthy - 1):.0%} too {state.split()[-1]}'
  return Finding(state, last, told)


def ended(message: str) -> Finding | None:
  """The finding for a run that stopped because a value was not finite.

  The rows do not show this, because values that are not finite are not written.

  Args:
    message: the last line that training printed.

  Returns:
    the finding; None if the run stopped for another reason.
  """
  match = re.search(r'stopped: \w+ is (-?inf|nan) at step (\d+)', message)
  return match and Finding('not finite', int(match[2]), match[0])


def distance(
  step: int, fid: float, curve: Sequence[tuple[int, float]]
) -> Finding:
  """Compares a FID with the healthy run's; both by the paper's protocol.

  Args:
    step: step of the checkpoint.
    fid: FID of 50,000 samples of 1000 steps.
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
  """The findings as lines, followed by likely causes of those outside a band.

  If the loss is not healthy, only its causes are listed; causes of a high
  distance assume a healthy loss.

  Args:
    findings: results of `loss` and `distance`.
  """
  lines = [one.told for one in findings]
  unwell = [one for one in findings if one.suspects]
  losses = [one for one in unwell if not one.state.startswith('distance')]
  for one in losses or unwell:
    lines.append(f'{one.state}; likely causes:')
    lines += [f'  {i}. {what}' for i, what in enumerate(one.suspects, 1)]
  return lines
