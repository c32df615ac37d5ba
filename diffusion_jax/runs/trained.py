"""The library API: a trained network, loaded from a run's folder."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import codecs, models, runs
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import (
  adapted,
  averaged,
  controlled,
  draw,
  edits,
  frozen,
  guided,
  labels,
  loading,
  low_rank,
  planned,
  recipe,
  sizes,
  upscaled,
)
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import files, numerics
from diffusion_jax.training import sharding


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
  """A trained network: a denoiser, its schedule, and methods to sample.

  Attributes:
    workdir: the run's folder.
    config: the run's resolved config, as plain dicts.
    step: the training step of the weights.
    ema: whether the weights are the averaged ones.
    recipe: its network, codec and conditioner.
    params: name -> parameters of each part, nested dicts of arrays on `mesh`.
    mesh: the devices that hold the parameters.
    compiled: the compiled functions, shared with the results of `at`.
    guides: other networks that guide this one, by name, see `guided_by` and
      `classified_by`.
    average: facts about the average if one was chosen, see `averaged.load`.
    changes: what `with_lora` has added to the network.
    of_sizes: what `sized` has made, by size.
    controls: facts about what `with_control` has.
    known_sha256: the hash of a network with low-rank changes; '' without.
    low_resolution: the pictures that it sharpens, see `upscaled`.
  """

  workdir: files.Path
  config: dict
  step: int
  ema: bool
  recipe: recipe.Recipe
  params: dict
  mesh: Mesh
  compiled: draw.Compiled
  guides: dict[str, 'Trained'] = dataclasses.field(default_factory=dict)
  average: dict = dataclasses.field(default_factory=dict)
  changes: tuple[adapted.Change, ...] = ()
  of_sizes: dict = dataclasses.field(default_factory=dict)
  controls: tuple[dict, ...] = ()
  known_sha256: str = ''
  low_resolution: upscaled.Pictures | None = None

  def __repr__(self):
    count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return (
      f"Trained('{self.workdir}', step={self.step}, ema={self.weights!r}, "
      f'{count:,} parameters, images {self.image_shape})'
    )

  @property
  def model(self) -> models.Model:
    """The network; `model.apply(params['net'], xt, t)` is its prediction."""
    return self.recipe.network

  @property
  def weights(self) -> bool | str:
    """Which weights: `ema`, or the `ema_profile` that was chosen."""
    return self.average.get('ema_profile') or self.ema

  @property
  def schedule(self) -> schedules.Schedule:
    """The noise schedule; times are 0 .. schedule.num_timesteps - 1."""
    return self.recipe.schedule

  @property
  def codec(self) -> codecs.Codec:
    """Data <-> x0; 8-bit images are in [-1, 1]."""
    return self.recipe.codec

  @property
  def prediction(self) -> str:
    """What the network predicts, a key of `gaussian.PARAMETRISATIONS`."""
    return self.config['loss'].get('prediction')

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the data."""
    return runs.image_shape(self.config['data'])

  @numerics.fixed()
  def denoise(
    self, xt: jax.Array, t: jax.Array, cond: dict | None = None
  ) -> gaussian.Denoised:
    """Estimates x0 and eps from noised data.

    Args:
      xt: [B, *codec.shape], alpha(t) x0 + sigma(t) eps.
      t: [B] or a scalar, times in [-1, T-1]; -1 is clean data.
      cond: the network's conditioning inputs, such as {'label': [B]}; what is
        left out is the null condition.

    Returns:
      Denoised(x0, eps, fraction), each of xt's shape; x0 is not clipped, see
      `guidance.clip_x0`, and fraction is None unless the variance is learned.

    Raises:
      UserError: a condition that the run does not take; or no label, and the
        run was trained with conditioning.drop=0.
    """
    given = labels.given(cond or {}, self.recipe.conditioner)
    return self.compiled.denoise(self.params, xt, t, given)

  @numerics.fixed()
  def at(self, step: int | None = None) -> 'Trained':
    """Returns the network at another checkpoint, with the same programs.

    Args:
      step: the step of the checkpoint; by default the newest that is not
        damaged.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or its parameters
        are not finite.
    """
    return loading.at(self, step)

  def using(self, ema_profile: str | float | None) -> 'Trained':
    """Returns the network with another average, with the same programs.

    Args:
      ema_profile: the average, see `load`; None = that of `ema.decay`.

    Raises:
      UserError: there is no such average, or as for `at`.
    """
    return loading.using(self, ema_profile)

  def with_lora(self, path, scale: float = 1.0) -> 'Trained':
    """Returns the network with low-rank changes (LoRA, arXiv 2106.09685).

    The compiled functions are shared, as by `at`. Several calls add up.

    Args:
      path: a safetensors file of LoRA, a folder with one, or a run that has
        trained LoRA.
      scale: a factor on the changes; 0 = none of them.

    Raises:
      UserError: it is no such file, or is for a network with other layers.
    """
    return adapted.applied(self, adapted.read(path, scale, self.config))

  @property
  def about_changes(self) -> dict:
    """{'lora': facts about each change}, and 'control' alike; {} without."""
    lora = [change.facts for change in self.changes]
    facts = {'lora': lora, 'control': [*self.controls]}
    return {name: each for name, each in facts.items() if each}

  def with_control(
    self, path, picture, scale: float = 1.0, image_size=None
  ) -> 'Trained':
    """Returns the network steered by a picture (ControlNet, arXiv 2302.05543).

    Several calls add up, and share what is compiled.

    Args:
      path: a folder of diffusers' `ControlNetModel`.
      picture: a file, or uint8 [H, W, 3] or [H, W]: edges or depths, say.
      scale: a factor on what the net adds; 0 = nothing.
      image_size: of the images to draw, see `sized`.

    Raises:
      UserError: folder or picture do not fit, see `controlled.read`.
    """
    found = controlled.read(path, picture, scale, self.config, image_size)
    return controlled.applied(self, found)

  def guided_by(self, guide: 'Trained') -> 'Trained':
    """Returns the network with another one as its guide (arXiv 2406.02507).

    Samples with a guidance w other than 1 are then drawn with u + w (c - u),
    where c is this network and u the guide, with the same condition.

    Args:
      guide: another checkpoint or run, such as a smaller network or an earlier
        step; its schedule and its prediction may differ.

    Raises:
      UserError: its data or its classes differ from this network's.
    """
    return self._with(guided.GUIDE, guide)

  def classified_by(self, classifier: 'Trained') -> 'Trained':
    """Returns the network guided by a classifier (arXiv 2105.05233).

    Samples then need labels, and take classifier_scale.

    Args:
      classifier: a run with loss.name='classification'.

    Raises:
      UserError: it is not, or its data or classes differ from this network's.
    """
    return self._with(guided.CLASSIFIER, classifier)

  def _with(self, name, other) -> 'Trained':
    guided.check(self.config, other.config, other.workdir, name)
    guided.check_latents(self.params, other.params, other.workdir, name)
    guides = {**self.guides, name: other}
    recipes = {key: one.recipe for key, one in guides.items()}
    made = draw.compiled(self.recipe, self.mesh, **recipes)
    return dataclasses.replace(self, guides=guides, compiled=made, of_sizes={})

  def sized(self, image_size) -> 'Trained':
    """Returns the network for images of another size.

    The same levels attend. What is compiled for a size is kept.

    Args:
      image_size: pixels, or (height, width), or text as of --image_size.

    Raises:
      UserError: the network cannot draw that size, see `sizes`.
    """
    return sizes.of(self, image_size)

  @property
  def all_params(self) -> dict:
    """The parameters that samples are drawn with, those of guides, too."""
    others = {name: other.params for name, other in self.guides.items()}
    return {**self.params, **others}

  @functools.cached_property
  def weights_sha256(self) -> str:
    """SHA-256 of the parameters: float32, in the order of their names.

    Of a network with low-rank changes, of those without them and of these.
    """
    return adapted.sha256(self.params, self.known_sha256)

  @numerics.fixed()
  def plan(self, **options) -> plans.Plan:
    """Makes a sampling plan, by default with the settings of the run's paper.

    Args:
      **options: sampler, num_steps, grid, clip, seed and the sampler's options,
        see `samplers.plan.create`; guidance, guidance_interval and
        guidance_rescale, see `samplers.guided`; label, prompts and
        negative_prompt, see `prompts.condition`; image_size, see `sized`.
        Pictures to sharpen are those of `low_resolution`.

    Raises:
      UserError: an unknown name, a number out of range, or a plan that needs a
        calibration of the network, if there is none.
    """
    return planned.plan(self, options)

  @numerics.fixed()
  def drawer(
    self, how: plans.Plan, frames: tuple[int, ...] = (), **options
  ) -> Callable:
    """Returns a compiled function that draws samples by index.

    Args:
      how: the plan.
      frames: numbers of steps at which to keep x, see `samplers.solve`.
      **options: dtype, took and estimates, see `draw.drawer`.

    Returns:
      indices (NumPy, [N]) -> data [M, H, W, C], a global array. Only the first
      N rows are valid: M is N rounded up to a size that the mesh divides. With
      `frames`, a pair of the data and [F, M, H, W, C]; with `took`, a pair of
      the data and `samplers.adaptive.Took`, [M] each. It compiles once per M.

    Raises:
      UserError: an unknown dtype. The function raises it for data that are not
        finite.
    """
    draw_fn = planned.drawer(self, how, frames=tuple(frames), **options)

    @numerics.fixed()
    def draw_batch(indices):
      rows = planned.rows(self, indices)
      size = sharding.rounded(len(indices), self.mesh)
      return draw_fn(sharding.put_padded(rows, size, self.mesh))

    return draw_batch

  @numerics.fixed()
  def sample(
    self,
    num_samples: int = 1,
    *,
    first: int = 0,
    batch_size: int = 64,
    dtype: str | None = None,
    **options,
  ) -> np.ndarray:
    """Draws images.

    An image depends only on the seed and its index, not on the batch: image 5
    of 6 is the same as image 5 of 50,000.

    Args:
      num_samples: the number of images.
      first: the index of the first image.
      batch_size: the number of images drawn at once.
      dtype: dtype of the data: 'uint8', or 'float32' in [0, 255], not rounded.
      **options: see `samplers.plan.create`: sampler ('ancestral'), num_steps
        (all), grid ('uniform'), seed (0), clip (the config's), and the
        sampler's options, such as eta; image_size, see `sized`; of conditional
        runs, label or prompts, negative_prompt and guidance, see `plan`; and of
        runs that sharpen pictures low_resolution, uint8 [P, h, w, C], which
        images get in turn, and low_resolution_noise, see `upscaled.given`.

    Returns:
      An array [num_samples, H, W, C] of the dtype.

    Raises:
      UserError: an unknown name, a number out of range, or data that are not
        finite.
    """
    indices = draw.indices_of(num_samples, first, batch_size)
    size = sharding.rounded(min(batch_size, num_samples), self.mesh)
    made = upscaled.asked(self, options)
    draw_fn = planned.drawer(made, made.plan(**options), frames=(), dtype=dtype)
    rows = planned.rows(made, indices)
    return sharding.in_batches(draw_fn, rows, size, self.mesh)

  @numerics.fixed()
  def edit(self, images, measurement, **options) -> np.ndarray:
    """Answers what is known of pictures: uint8 [N, samples, H, W, C].

    Args:
      images: what is known, [N, H, W, C] in [0, 255].
      measurement: such as 'inpaint', see `runs.edits.edit`.
      **options: method, samples, noise, mask, strength, seed, label; see there.
    """
    return edits.edit(self, images, measurement, **options)


@numerics.fixed()
def load(
  workdir,
  step: int | None = None,
  ema: bool = True,
  mesh: Mesh | None = None,
  ema_profile: str | float | None = None,
) -> Trained:
  """Loads the trained network of a run, without the optimiser's state.

  Args:
    workdir: the run's folder, local or gs://BUCKET/FOLDER.
    step: the step of the checkpoint; by default the newest that is not damaged.
    ema: whether to load the averaged or the raw weights; a run without an
      average has the raw ones only.
    mesh: the devices to load the parameters to; by default they are replicated
      on every device, and samples are divided over the devices.
    ema_profile: another average, by its relative width, such as 0.13, which is
      reconstructed from those kept, or a kept one, such as 'decay:0.999'.

  Raises:
    UserError: there is no run or no such checkpoint, it is damaged, its
      parameters are not finite, or it has no such average.
  """
  workdir = files.at(workdir).expanduser()
  config = runs.read_config(workdir, 'workdir')
  mesh = mesh or sharding.make_mesh()
  made = recipe.create(
    low_rank.plain(config), frozen.copied(config, mesh, workdir)
  )
  compiled = draw.compiled(made, mesh)
  average = averaged.check(config['ema'], ema, ema_profile)
  ema = ema and (bool(average) or config['ema']['decay'] > 0)
  return Trained(
    workdir, config, 0, ema, made, {}, mesh, compiled, average=average
  ).at(step)
