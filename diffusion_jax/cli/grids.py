"""Grids of samples with what they show: captions, prompts or labels."""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.data import Source
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import guided, labels, texts, upscaled
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.plan import Plan


def of_samples(trained: Trained, plan: Plan, images: np.ndarray) -> np.ndarray:
  """A picture of the first samples, see `rows`, beside what they sharpen.

  Args:
    trained: the network.
    plan: the plan that they were drawn by.
    images: uint8 [N, H, W, C].

  Returns:
    uint8 [height, width, 3].
  """
  if trained.low_resolution is not None:
    small = upscaled.rows(trained.low_resolution, np.arange(len(images)))
    return pictures.beside(small[upscaled.ROW], images)
  captions = told(trained, plan, len(images))
  return pictures.in_turn(images, rows(plan, len(images)), captions)


def labels_asked(plan) -> list[int]:
  """The labels that samples get in turn; [] if they get them by chance."""
  asked = plan.condition.get('label', 'data')
  return [] if asked == 'data' else asked


def rows(plan, shown: int) -> int:
  """The rows of a grid: one for each label, or prompt of two and more images.

  Args:
    plan: the plan.
    shown: number of images.
  """
  prompts = plan.condition.get('prompts')
  if prompts is None:
    return len(labels_asked(plan)) or 1
  return len(prompts) if 2 * len(prompts) <= shown else 1


def told(trained: Trained, plan: Plan, count: int) -> Sequence[str] | None:
  """What the first samples are of: prompts, or labels; None without any.

  Args:
    trained: the network.
    plan: the plan.
    count: how many samples.
  """
  if prompts := plan.condition.get('prompts'):
    return [prompts[i % len(prompts)] for i in range(count)]
  found = labels.of_samples(plan, count)
  if found is None:
    return None
  other = trained.guides.get(guided.CLASSIFIER)
  names = labels.names(trained.workdir, trained.config, other)
  return [names[label] for label in found]


def of_training(
  made: Recipe, images: np.ndarray, source: Source, workdir
) -> np.ndarray:
  """A picture of samples that are drawn during training.

  Args:
    made: the run's recipe; labels come in turn.
    images: uint8 [N, H, W, C].
    source: the training images, of whose captions samples are drawn.
    workdir: the run's folder.

  Returns:
    uint8 [height, width, 3].
  """
  captions, kinds = texts.captions_of_grid(source, len(images)), 1
  if classes := made.conditioner.doors.get('label'):
    kinds, names = classes, labels.names_in(workdir, classes)
    captions = [names[i % classes] for i in range(len(images))]
  return pictures.in_turn(images, kinds, captions)
