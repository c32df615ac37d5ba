"""How a trained network samples: its plan, and the program that draws."""

import json
from collections.abc import Callable

import numpy as np

from diffusion_jax.runs import (
  calibration,
  draw,
  guided,
  imported,
  prompts,
  sizes,
  upscaled,
)
from diffusion_jax.samplers import plan as plans


def plan(trained, options: dict) -> plans.Plan:
  """Makes a plan, by default with the settings of the run's paper.

  Args:
    trained: the network, a `Trained`.
    options: see `Trained.plan`.

  Raises:
    UserError: see there.
  """
  options = {**imported.sampling(trained.workdir, options)}
  config = trained.config
  asked = {name: options.pop(name, None) for name in prompts.NAMES}
  condition = prompts.condition(
    trained.workdir, config, asked, trained.guides.get(guided.CLASSIFIER)
  )
  condition |= upscaled.condition(config, trained.low_resolution)
  facts = {
    name: guided.facts(other, name) for name, other in trained.guides.items()
  }
  sides = sizes.parsed(options.pop('image_size', None), config)

  def found():
    calibration.check_plain(trained, sides)
    kept = calibration.read(
      trained.workdir, trained.step, trained.weights,
      trained.schedule.num_timesteps,
    )  # fmt: skip
    calibration.check(kept, trained)
    return kept

  made = plans.for_run(
    config, calibration=found, condition=condition, image_size=sides, **facts,
    **options,
  )  # fmt: skip
  if sides:
    sizes.check(config, sides)
  return made


def drawer(trained, how: plans.Plan, **options) -> Callable:
  """The compiled function that draws by a plan.

  Args:
    trained: the network, a `Trained`.
    how: the plan.
    **options: see `draw.drawer`.

  Returns:
    rows, see `rows`, as global arrays -> the data.
  """
  how, texts = prompts.tables(trained.workdir, trained.config, how)
  draw_fn = trained.sized(how.image_size).compiled.drawer(
    json.dumps(how), **options
  )

  def drawn(given):
    indices, *others = given
    found = draw_fn(trained.all_params, indices, *(others or [None]), texts)
    return draw.checked(*found)

  return drawn


def rows(trained, indices: np.ndarray) -> list:
  """What `drawer` takes of each sample: its index, and pictures if there are.

  Args:
    trained: the network, a `Trained`.
    indices: [N].
  """
  pictures = upscaled.rows(trained.low_resolution, indices)
  return [np.asarray(indices, np.uint32), *([pictures] if pictures else [])]
