"""Autoencoders: reconstruction, a regulariser of the latents, and a critic.

The reconstruction is compared by L1 (or L2), SSIM and LPIPS. A critic of
patches (arXiv 2012.09841) is trained with the hinge loss to tell pictures from
reconstructions, and the autoencoder to deceive it. All terms are means over
pixels, so the weights are those of arXiv 2112.10752, whose terms are sums.

The critic's term is scaled to have as large a gradient at the decoder's last
kernel as the reconstruction has (arXiv 2012.09841, eq. 7). A ratio of norms of
sums over a batch is not a sum over rows, so the one of the step before is used:
it is the same on every mesh and in any number of microbatches. It is 0 in the
first step, whose critic is random.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.codecs.codec import Codec
from diffusion_jax.models import Model, bottleneck
from diffusion_jax.models import lpips as perceptual
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.objectives import similarity
from diffusion_jax.objectives.objective import Aux, Objective, branch

CODEC, CRITIC = 'codec', 'critic'  # the trained parts
LPIPS = 'lpips'  # the part that is not trained
LAST = ('decoder', 'conv_out', 'kernel')  # where gradients are compared
LARGEST = 1e4  # of the ratio of gradients
GUARD = 1e-4  # added to its denominator
SPAN = 2.0  # of pixels, which are in [-1, 1]


class Latents(NamedTuple):
  """What lies between encoder and decoder.

  Attributes:
    z: [B, h, w, z], for the decoder.
    penalty: [B], the weighted terms of the loss.
    by_row: name -> [B, ...], see `Aux`.
    sums: name -> array, see `Aux`.
  """

  z: jax.Array
  penalty: jax.Array
  by_row: dict
  sums: dict


def create(
  coder: Coder,
  codec: Codec,
  critic: Model | None = None,
  *,
  l1: float = 1.0,
  l2: float = 0.0,
  ssim: float = 0.1,
  lpips: float = 0.0,
  kl: float = 1e-6,
  commitment: float = 0.25,
  decay: float = 0.99,
  revive: float = 0.03,
  critic_weight: float = 0.5,
  critic_start: int = 0,
) -> Objective:
  """The loss of an autoencoder.

  Args:
    coder: the autoencoder, of the part 'codec'.
    codec: rows -> pictures in [-1, 1].
    critic: the critic, of the part of this name; None for none.
    l1: weight of the mean absolute error.
    l2: weight of the mean squared error.
    ssim: weight of 1 - SSIM.
    lpips: weight of LPIPS, of the frozen part of this name; 0 needs no part.
    kl: weight of the KL term, in nats, beside sums over pixels.
    commitment: of 'vq': weight of the mean squared distance to the codes.
    decay: of 'vq': of the averages that make the codebook.
    revive: of 'vq': the share of the mean count below which a code is dead, and
      replaced by latents of the batch; 0 for never.
    critic_weight: the critic's weight, times the ratio of gradients.
    critic_start: the step from which the critic counts for the autoencoder; it
      is trained from the first step on.
  """
  weights = {'kl': kl, 'commitment': commitment}

  compared = functools.partial(_compared, l1=l1, l2=l2, ssim=ssim, lpips=lpips)

  def values_at(params, rows, keys):
    x = codec.encode(params, rows, keys)
    latents = between(coder, params[CODEC], x, keys, **weights)
    seen, pull = _decoded(coder, params[CODEC], latents.z)
    return x, latents, seen, pull

  def loss(params, extras, rows, keys):
    x, latents, seen, pull = values_at(params, rows, keys)
    values, by_row, slope = _with_slope(lambda y: compared(params, x, y), seen)
    by_row = {**by_row, **latents.by_row}
    sums = dict(latents.sums)
    if critic:
      on = extras['steps'] >= critic_start
      weight = critic_weight * jnp.where(on, extras['ratio'], 0.0)
      deceived, _, against = _with_slope(
        lambda y: (-_judge(critic, jax.lax.stop_gradient(params), y), {}), seen
      )
      judged, told = hinge(critic, params, x, jax.lax.stop_gradient(seen))
      sums |= {'pixels': pull(slope), 'deceiving': pull(against)}
      by_row |= told | {'critic_weight': jnp.broadcast_to(weight, len(x))}
      values = values + weight * deceived + judged
    return values + latents.penalty, Aux(by_row, sums)

  def heldout(params, extras, rows, keys, index):
    del extras, index
    x, latents, seen, _ = values_at(params, rows, keys)
    return compared(params, x, seen)[0] + latents.penalty

  made = Objective(loss, heldout, metrics)
  if critic:
    made = made._replace(extras=_critic_extras(), update=_balanced)
  if coder.regulariser == 'vq':
    return with_codebook(made, coder, decay, revive)
  return made


def _compared(params, x, seen, *, l1, l2, ssim, lpips):
  """How far reconstructions are from pictures: [B], and its terms by name."""
  axes = tuple(range(1, x.ndim))
  by_row = {
    'l1': jnp.mean(jnp.abs(x - seen), axis=axes),
    'l2': jnp.mean(jnp.square(x - seen), axis=axes),
    'psnr': similarity.psnr(x, seen, SPAN),
  }
  values = l1 * by_row['l1'] + l2 * by_row['l2']
  if ssim:
    by_row['ssim'] = similarity.ssim(x + 1, seen + 1, SPAN)
    values = values + ssim * (1 - by_row['ssim'])
  if lpips:
    by_row['lpips'] = perceptual.apply(params[LPIPS], x, seen)
    values = values + lpips * by_row['lpips']
  return values, by_row


def metrics(values, by_row, sums) -> dict:
  """Means of the terms, and how the codes of a batch are used."""
  del values
  shown = {
    name: jnp.mean(x)
    for name, x in by_row.items()
    if name not in (CANDIDATE, PRIORITY)
  }
  if COUNTS in sums:
    shown |= bottleneck.use_of(sums[COUNTS])
  return shown


# --- the latents --------------------------------------------------------------


def between(coder: Coder, part, x, keys, *, kl=0.0, commitment=0.0) -> Latents:
  """Encodes pictures, and regularises the latents.

  Args:
    coder: the autoencoder.
    part: its parameters.
    x: [B, H, W, C] pictures in [-1, 1].
    keys: [B] the examples' random keys.
    kl: see `create`.
    commitment: see `create`.
  """
  found = coder.encode(part, x)
  if coder.regulariser == 'kl':
    posterior = bottleneck.posterior(found)
    nats = bottleneck.kl(posterior)
    z = bottleneck.sample(posterior, branch(keys, 'codec'))
    return Latents(z, kl / x[0].size * nats, {'kl': nats}, {})
  if coder.regulariser == 'vq':
    return _coded(part['quantize']['codebook'], found, keys, commitment)
  nothing = jnp.zeros(len(x))
  if coder.regulariser == 'fsq':
    counts = bottleneck.histogram(coder.index_of(part, found), coder.codes)
    z = bottleneck.straight_through(found, coder.snap(part, found))
    return Latents(z, nothing, {}, {COUNTS: counts})
  return Latents(found, nothing, {}, {})


# Of a codebook: names in `Latents.by_row`, `Latents.sums` and `extras`.
CANDIDATE, PRIORITY = 'candidate', 'priority'
COUNTS, TOTALS = 'counts', 'totals'


def _coded(codebook, found, keys, commitment) -> Latents:
  """The latents' nearest codes; one latent of each example is a candidate."""
  codebook = jax.lax.stop_gradient(codebook)
  index = bottleneck.nearest(codebook, found)
  nearest = codebook[index]
  error = jnp.mean(jnp.square(nearest - found), axis=(1, 2, 3))
  counts, totals = bottleneck.counted(index, found, len(codebook))

  def chance(key):
    place, rank = jax.random.split(key)
    places = found.shape[1] * found.shape[2]
    return jax.random.randint(place, (), 0, places), jax.random.uniform(rank)

  places, ranks = jax.vmap(chance)(branch(keys, 'revival'))
  flat = found.reshape(len(found), -1, found.shape[-1])
  candidates = jnp.take_along_axis(flat, places[:, None, None], axis=1)[:, 0]
  return Latents(
    bottleneck.straight_through(found, nearest),
    commitment * error,
    {
      'commitment': error,
      CANDIDATE: jax.lax.stop_gradient(candidates),
      PRIORITY: ranks,
    },
    {COUNTS: counts, TOTALS: totals},
  )


def with_codebook(
  made: Objective, coder: Coder, decay: float, revive: float
) -> Objective:
  """An objective that also keeps the averages of a codebook, and writes it.

  Args:
    made: the objective without.
    coder: the autoencoder.
    decay: see `create`.
    revive: see `create`.
  """
  shapes = jax.eval_shape(coder.init, jax.random.key(0))
  codes, channels = shapes['quantize']['codebook'].shape

  def update(extras, aux):
    average = bottleneck.averaged(
      (extras[COUNTS], extras[TOTALS]),
      (aux.sums[COUNTS], aux.sums[TOTALS]),
      decay,
    )
    if revive:
      # By priority, so that the order of the rows has no effect.
      priority = aux.by_row[PRIORITY]
      _, order = jax.lax.top_k(priority, min(codes, len(priority)))
      average = bottleneck.revived(
        average, revive * jnp.mean(average[0]), aux.by_row[CANDIDATE][order]
      )
    others = made.update(extras, aux)
    return {**others, COUNTS: average[0], TOTALS: average[1]}

  def write(params, extras):
    part = params[CODEC]
    average = extras[COUNTS], extras[TOTALS]
    book = bottleneck.codebook_of(average, part['quantize']['codebook'])
    return {**params, CODEC: {**part, 'quantize': {'codebook': book}}}

  counts = jnp.zeros(codes)
  return made._replace(
    extras={
      **made.extras, COUNTS: counts, TOTALS: jnp.zeros((codes, channels)),
    },
    update=update,
    write=write,
  )  # fmt: skip


# --- the critic ---------------------------------------------------------------


def hinge(critic: Model, params, x, seen) -> tuple[jax.Array, dict]:
  """The critic's loss, and what it makes of pictures and reconstructions.

  Args:
    critic: the critic.
    params: all parts.
    x: [B, H, W, C] pictures.
    seen: [B, H, W, C] reconstructions.

  Returns:
    ([B], name -> [B]).
  """
  # Of two calls, XLA would not share the casts of the parameters.
  logits = critic.apply(params[CRITIC], jnp.concatenate([x, seen]))
  real, fake = jnp.split(logits.reshape(len(logits), -1), 2)
  values = 0.5 * jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), axis=1)
  told = {
    'critic_loss': values,
    'critic_real': jnp.mean(real, axis=1),
    'critic_fake': jnp.mean(fake, axis=1),
  }
  return values, jax.lax.stop_gradient(told)


def _judge(critic, params, seen):
  logits = critic.apply(params[CRITIC], seen)
  return jnp.mean(logits.reshape(len(seen), -1), axis=1)


def _critic_extras():
  return {'steps': jnp.zeros((), jnp.int32), 'ratio': jnp.zeros(())}


def _balanced(extras, aux):
  """The ratio of gradients of this step, for the next one."""
  rows = len(aux.by_row['l1'])
  pixels, deceiving = (
    jnp.sqrt(jnp.sum(jnp.square(aux.sums[name] / rows)))
    for name in ('pixels', 'deceiving')
  )
  ratio = jnp.clip(pixels / (deceiving + GUARD), 0.0, LARGEST)
  return {**extras, 'steps': extras['steps'] + 1, 'ratio': ratio}


def _decoded(coder, part, z) -> tuple[jax.Array, Callable]:
  """Reconstructions, and their derivative by the decoder's last kernel.

  Returns:
    ([B, H, W, C], pull): pull(slope [B, H, W, C]) is the derivative of the sum
    of slope * reconstructions.
  """
  group, layer, name = LAST

  def decode(kernel):
    last = {**part[group][layer], name: kernel}
    return coder.decode({**part, group: {**part[group], layer: last}}, z)

  seen, pull = jax.vjp(decode, part[group][layer][name])
  return seen, lambda slope: jax.lax.stop_gradient(pull(slope)[0])


def _with_slope(score: Callable, seen) -> tuple[jax.Array, dict, jax.Array]:
  """Values of reconstructions, whose derivative is computed only once.

  Args:
    score: reconstructions [B, ...] -> (values [B], aux).
    seen: the reconstructions.

  Returns:
    (values, aux, slope): the derivative of a value by its reconstruction is
    slope [B, ...]; nothing else has a derivative.
  """
  values, pull, aux = jax.vjp(score, jax.lax.stop_gradient(seen), has_aux=True)
  (slope,) = jax.lax.stop_gradient(pull(jnp.ones_like(values)))
  moved = jnp.sum(slope * seen, axis=tuple(range(1, seen.ndim)))
  moved = moved - jax.lax.stop_gradient(moved)  # 0, with a derivative
  aux, values = jax.lax.stop_gradient((aux, values))
  return values + moved, aux, slope
