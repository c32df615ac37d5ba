"""Our transformer's parameters under the names of diffusers'."""

import re

import numpy as np

from diffusion_jax import models

# Their blocks each have a copy of the embedders.
_EMBEDDERS = {
  'time1': 'timestep_embedder.linear_1',
  'time2': 'timestep_embedder.linear_2',
  'label': 'class_embedder.embedding_table',
}
_RENAMED = {
  'modulation': 'norm1.linear',
  **{name: f'attn1.to_{name[0]}' for name in ('query', 'key', 'value')},
  'out': 'attn1.to_out.0',
  'mlp1': 'ff.net.0.proj',
  'mlp2': 'ff.net.2',
}
_ENDS = {'patches': 'pos_embed.proj', 'modulation': 'proj_out_1'}
_ENDS |= {'out': 'proj_out_2'}


def to_tensors(params, patch_size: int) -> dict[str, np.ndarray]:
  """The state dict of a DiTTransformer2DModel."""
  params, tensors = models.named(params), {}
  blocks = {int(n.split('/')[1]) for n in params if n.startswith('blocks/')}
  for name, value in params.items():
    *_, layer, kind = name.split('/')
    ends = 'bias' if kind == 'bias' else 'weight'
    array = np.asarray(value)
    if layer == 'patches' and kind == 'kernel':
      array = array.reshape(patch_size, patch_size, -1, array.shape[-1])
      array = array.transpose(3, 2, 0, 1)
    elif kind == 'kernel':
      array = array.T
    block = re.match(r'blocks/(\d+)', name)
    if block:
      theirs = [f'transformer_blocks.{block[1]}.{_RENAMED[layer]}']
    elif layer in _EMBEDDERS:
      theirs = [
        f'transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[layer]}' for i in blocks
      ]
    else:
      theirs = [_ENDS[layer]]
    tensors |= {
      f'{each}.{ends}': np.ascontiguousarray(array) for each in theirs
    }
  return tensors
