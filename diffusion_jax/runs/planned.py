"""The sampling plan of a trained network, from the library's options."""

from diffusion_jax.runs import calibration, guided, imported, prompts, sizes
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
