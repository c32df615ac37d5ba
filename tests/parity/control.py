"""Our ControlNets against diffusers', with random weights, and their folders.

Networks are described by their config.json alone, as in `parity.conditional`,
whose U-Nets they steer.
"""

import functools

import jax
import numpy as np

from diffusion_jax.models import control, doors
from diffusion_jax.weights import control as weights
from diffusion_jax.weights import diffusers, named
from parity import conditional, unet

NAMES = ('sd1', 'sd2', 'sdxl')
OF_UNET = ('sample_size', 'up_block_types')
WIDTHS = [4, 8]  # pictures are halved once


def settings(name: str) -> dict:
  """The config.json of a ControlNet for a case of `parity.conditional`."""
  theirs = conditional.settings(name)
  return {
    **{k: theirs[k] for k in theirs if k not in OF_UNET},
    '_class_name': weights.CLASS,
    weights.WIDTHS: WIDTHS,
  }


@functools.cache
def create(name: str) -> control.Control:
  """Our ControlNet."""
  options, found = weights.network_of(settings(name), name, 4)
  size = conditional.settings(name)['sample_size']
  return control.create(image_shape=(size, size, 4), doors=found, **options)


@functools.cache
def params(name: str) -> dict:
  """Random parameters, without zeros."""
  return unet.random_params(create(name))


def tensors(tree, linear: bool) -> dict[str, np.ndarray]:
  """Parameters as diffusers' state dict.

  Args:
    tree: the parameters.
    linear: diffusers' use_linear_projection.
  """

  def theirs(own, array):
    if own.startswith(weights.UNET):
      array = diffusers.to_theirs(own, array)
      is_projection = 'proj_' in own and own.endswith('kernel')
      return array[:, :, None, None] if is_projection and not linear else array
    if array.ndim == 4:
      return array.transpose(3, 2, 0, 1)
    return array.T[:, :, None, None] if array.ndim == 2 else array

  return named.tensors_of(tree, weights.name_of, theirs)


def picture(name: str) -> np.ndarray:
  """A picture in [0, 1], twice as large as what is noised."""
  height, width = conditional.CASES[name][1]
  given = unet.normal(f'picture of {name}', (1, 2 * height, 2 * width, 3))
  return np.clip(given / 4 + 0.5, 0, 1)


def residuals(name: str, scale: float = 0.8) -> list[np.ndarray]:
  """What our net adds."""
  net, xt, cond = create(name), *conditional.split(conditional.inputs(name))
  given = {**params(name), 'picture': picture(name), 'scale': np.float32(scale)}

  def run(given, xt, cond):
    hints = control.hints([net], [given], xt.shape[1:3])
    times = np.array(conditional.TIMES)
    return control.residuals([net], [given], hints, xt, times, cond)

  with jax.default_matmul_precision('highest'):
    return [np.asarray(x) for x in jax.jit(run)(given, xt, cond)]


def steered(name: str, added) -> np.ndarray:
  """What our U-Net answers with residuals."""
  return conditional.ours(name, **{doors.RESIDUALS: added})


def live(name: str, scale: float = 0.8) -> tuple[list[np.ndarray], np.ndarray]:
  """What diffusers' net adds and what its U-Net answers, channels last."""
  import diffusers as theirs
  import torch

  own = {k: v for k, v in settings(name).items() if k != '_class_name'}
  net = theirs.ControlNetModel(**own).eval()
  state = tensors(params(name), own.get('use_linear_projection', False))
  net.load_state_dict(
    {k: torch.from_numpy(v) for k, v in state.items()}, strict=True
  )
  given = {
    key: torch.from_numpy(array)
    for key, array in conditional.inputs(name).items()
  }
  added = None
  if 'ids' in given:
    added = {'text_embeds': given['pooled'], 'time_ids': given['ids']}
  xt = given['xt'].permute(0, 3, 1, 2).contiguous()
  shown = torch.from_numpy(picture(name)).permute(0, 3, 1, 2)
  times = torch.tensor(conditional.TIMES)
  with torch.no_grad():
    maps, middle = net(
      xt, times, given['tokens'], shown.repeat(2, 1, 1, 1), scale,
      added_cond_kwargs=added, return_dict=False,
    )  # fmt: skip
    answer = conditional.network_live(name)(
      xt, times, given['tokens'], added_cond_kwargs=added,
      down_block_additional_residuals=maps,
      mid_block_additional_residual=middle,
    ).sample  # fmt: skip
  last = [x.permute(0, 2, 3, 1).numpy() for x in (*maps, middle, answer)]
  return last[:-1], last[-1]
