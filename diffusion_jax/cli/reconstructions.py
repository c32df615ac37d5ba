"""Judges the reconstructions of an autoencoder's run."""

import jax
import jax.numpy as jnp
from absl import flags

from diffusion_jax import models
from diffusion_jax.cli import (
  command,
  declare,
  drawing,
  judges,
  judging,
  run_data,
)
from diffusion_jax.evaluation import cards, features, reconstructions, tables
from diffusion_jax.planning import flops
from diffusion_jax.reporting import page, pictures
from diffusion_jax.runs import averaged
from diffusion_jax.samplers import guided
from diffusion_jax.system import distributed, files, terminal

FLAGS = flags.FLAGS
# Below this number of held-out images, the distance is that of training images.
ENOUGH = 2000
SHOWN = 32  # images on the picture
# Flags that are for samples.
IDLE = (
  *('sampler', 'num_steps', 'grid', 'clip', 'output', 'rounding', 'reference'),
  *('follow', 'sweep', 'keep_samples', 'label', 'guide', 'classifier'),
  *('guide_ema_profile', *guided.OPTIONS, *drawing.OPTIONS),
  *('prompt', 'prompts', 'negative_prompt', 'lora'),
)


def carry_out() -> None:
  """Measures what is lost, writes a card and a picture, and reports them.

  Raises:
    UserError: the flags conflict, or there is no such run or image set.
  """
  command.refuse(IDLE, 'an autoencoder')
  trained = declare.of_run(declare.network)
  workdir, config = trained.workdir, trained.config
  source, heldout = run_data.splits(config)
  shown = heldout or source
  of_distance = shown if len(shown) >= ENOUGH else source
  images, compared = (
    features.images_of(x, min(len(x), FLAGS.num_samples))
    for x in (shown, of_distance)
  )
  judge = judges.judge_of(
    source, heldout, trained.image_shape, workdir / 'evaluations'
  )
  made = reconstructions.coding(trained, FLAGS.batch_size, FLAGS.seed)
  seen = reconstructions.reconstructed(compared, made)
  split = config['data'][
    'train_split' if of_distance is source else 'heldout_split'
  ]
  about = {
    'data': config['data']['name'],
    'split': split,
    'judged': 'reconstructions',
    'num_images': images.count,
    'images_sha256': features.sha256_of(images),
    'decoder_seed': FLAGS.seed,
  }
  task = judging.task(judge, seen, compared, about=about, usual=['fid'])
  card = judging.carry_out(
    task, seen, cards.subject_of(trained), None,
    batch_size=min(FLAGS.batch_size, features.BLOCK), mesh=trained.mesh,
    sample_cache=None,
  )  # fmt: skip
  with terminal.Progress('comparing', images.count, unit='images') as progress:
    card['results'] |= reconstructions.measure(images, made, progress.update)
  card['details'] |= {'images': images.description, 'cost': cost(trained)}
  told = _told(card['details']['cost'])
  if digest := config['loss'].get('lpips_sha256'):
    card['details']['lpips_sha256'] = digest
    told += f'\ntrained with LPIPS, whose weights have the SHA-256 {digest}'
  if of_distance is not shown:
    card['details'].setdefault('caveats', []).append(
      f'the distance is that of training images, as only {len(shown)} images '
      f'are held out, fewer than {ENOUGH}; the other numbers are of '
      f'{images.description}'
    )
  name = cards.name(
    f'step{trained.step}' + averaged.suffix(trained.weights),
    f'reconstructions_{images.count}', task.protocol,
  )  # fmt: skip
  path = workdir / 'evaluations' / f'{name}.json'
  beside = _beside(images, made)

  def keep():
    files.make(path.parent)
    pictures.save(path.with_name(f'{name}_images.png'), beside)
    files.write_json(path, card)

  distributed.on_first(keep)
  terminal.report(
    {**card, 'path': str(path)},
    f'{tables.text(card)}\n{told}\n\ncard: {path}',
    FLAGS.json,
  )
  page.update(workdir)


def _beside(images, made):
  """Images beside their reconstructions, evenly spaced."""
  count = min(SHOWN, images.count)
  chosen = [i * images.count // count for i in range(count)]
  originals = jnp.stack([images.image(i) for i in chosen])
  seen = made.reconstruct(jnp.asarray(chosen, jnp.uint32), originals)
  return pictures.beside(jax.device_get(originals), seen)


def cost(trained) -> dict:
  """What encoding and decoding an image costs.

  Returns:
    parameters of each part; FLOPs of encoder and decoder for an image, counting
    convolutions and products; the numbers of the latents and of the image; and
    the bytes of the latents as float32.
  """
  shape = trained.image_shape
  codec, params = trained.codec, trained.params
  key = jax.random.split(jax.random.key(0), 1)
  image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
  latents = jax.ShapeDtypeStruct((1, *codec.shape), jnp.float32)

  def encode(params, image):
    return codec.encode(params, {'image': image}, key)

  def decode(params, x0):
    return codec.decode(params, x0, key)

  counted = {
    name: int(flops.products(jax.jit(fn).trace(params, x).jaxpr).total())
    for name, fn, x in (('encode', encode, image), ('decode', decode, latents))
  }
  part = params['codec']
  numbers = {
    'encoder': part['encoder'],
    'decoder': part.get('decoder', params.get(models.NET)),
  }
  size = latents.size
  return {
    'parameters': {name: models.count(x) for name, x in numbers.items()},
    'flops_per_image': counted,
    'latents': list(codec.shape),
    'latent_numbers': size,
    'image_numbers': image.size,
    'latent_bytes': 4 * size,
  }


def _told(cost) -> str:
  parameters, counted = cost['parameters'], cost['flops_per_image']
  sizes = 'x'.join(map(str, cost['latents']))
  return (
    f'latents: {sizes}, {cost["latent_numbers"]:,} numbers of '
    f'{cost["image_numbers"]:,}, {cost["latent_bytes"]:,} bytes\n'
    + '\n'.join(
      f'{name}: {parameters[name]:,} parameters, {counted[verb] / 1e9:.3g} '
      'GFLOP an image'
      for name, verb in (('encoder', 'encode'), ('decoder', 'decode'))
    )
  )
