"""The tasks of `edit` that answer pictures: their flags and their help."""

import textwrap

from diffusion_jax.cli import declare

NOISE = 'Standard deviation of the noise in the pictures, in levels of 255'
STRENGTH = (
  'How far the picture is noised first, above 0 (not at all) and at most 1 (it '
  'is forgotten).'
)
# Task -> the flags of its own.
OWN = {
  'inpaint': {
    'mask': (
      str,
      'White where the picture is to be filled in: a picture, for all, or a '
      'folder with one of the same name for each.',
    ),
    'box': (str, 'TOP,LEFT,HEIGHT,WIDTH in pixels, to be filled in.'),
    'random': (float, 'Share of pixels, chosen at random, to be filled in.'),
    'noise': (0.0, f'{NOISE}; without noise, known pixels are kept exactly.'),
  },
  'upscale': {
    'factor': (2, '2, 4 or 8 times as many pixels a side.'),
    'by': (
      ('mean', 'bicubic'),
      'How the small picture was made: the mean of blocks, or bicubic.',
    ),
    'noise': (0.0, f'{NOISE}.'),
  },
  'colourise': {'noise': (0.0, f'{NOISE}.')},
  'deblur': {
    'blur': (
      'gaussian',
      'gaussian, motion, or a picture of the kernel, such as kernel.png.',
    ),
    'sd': (1.0, '--blur=gaussian: its standard deviation in pixels.'),
    'length': (5.0, '--blur=motion: its length in pixels.'),
    'angle': (0.0, '--blur=motion: degrees, counterclockwise from the right.'),
    'noise': (2.0, f'{NOISE}.'),
  },
  'denoise': {
    'noise': (float, f'{NOISE}; by default estimated from each picture.'),
  },
  'restyle': {'strength': (0.6, STRENGTH)},
  'vary': {'strength': (0.3, STRENGTH)},
}
# Task -> the measurement that it is.
KINDS = {name: name for name in OWN} | {'restyle': None, 'vary': None}


def declare_own(task: str) -> None:
  """Declares the flags of a task."""
  declare.table(**OWN[task])


_SAYS = """
  python -m diffusion_jax.edit {task} --workdir=runs/digits --input=pictures \\
    {flags}--output={task}_answers

{what}

Several answers per picture (--samples) are samples of what the picture may be;
spread/NAME.png shows where they differ. Each answer is a PNG that carries its
address: run, weights, input, seed and index. An interrupted job resumes: what
is there already is not drawn again. edit.json has the protocol and the numbers,
and overview.png the first pictures beside their answers."""

_WHAT = {
  'inpaint': (
    '--box=2,2,4,4 ',
    'Fills in what --mask, --box, --random or transparency leaves unknown. '
    'Known pixels are kept exactly, unless --noise says that they are noisy.',
  ),
  'upscale': (
    '--factor=2 ',
    'Makes pictures larger. Their means over blocks (or --by=bicubic) stay '
    'those of the small pictures.',
  ),
  'colourise': (
    '',
    'Gives grey pictures colours, for runs of colour images.',
  ),
  'deblur': (
    '--blur=gaussian --sd=1 ',
    'Undoes a known blur. Pictures are mirrored at their borders.',
  ),
  'denoise': (
    '--noise=25 ',
    'Removes white noise. --method=mean gives the mean of all pictures that '
    'it may be, in one evaluation of the network: the smallest error. Other '
    'methods draw samples, which are sharper, and whose squared error is '
    'twice as large.',
  ),
  'restyle': (
    '--strength=0.6 --label=3 ',
    'Noises the picture up to --strength and draws it again, with a --label '
    'or a --prompt where the run takes one (SDEdit, arXiv 2108.01073).',
  ),
  'vary': (
    '--strength=0.3 ',
    'Draws variations of a picture: four by default (SDEdit, arXiv '
    '2108.01073).',
  ),
}
DOCS = {
  task: _SAYS.format(task=task, flags=given, what=textwrap.fill(what, 79))
  for task, (given, what) in _WHAT.items()
}
