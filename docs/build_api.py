"""Writes docs/api.md from the docstrings.

With --check it writes nothing, and fails where the page is stale.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'api.md'

# Module -> what of it is public, in the order in which it is best read. The
# package itself is ''.
PUBLIC = {
  '': 'load Trained',
  'process.schedules': 'Schedule create linear from_betas',
  'process.gaussian': (
    'q_sample posterior_coefficients step_variance log_variance_table '
    'from_prediction to_target denoiser Denoised'
  ),
  'process.losses': 'squared_error',
  'process.likelihood': (
    'bound terms term prior prepare variances rate_distortion Table Scored '
    'Steps'
  ),
  'process.fast_bound': 'estimate pilot proposal sampled interval Estimated',
  'process.decoder': 'discretised_log_likelihood check_discrete',
  'process.flow': 'density dequantised variational Flow',
  'models': 'create Model count',
  'models.unet': 'UNet',
  'models.inception': 'apply preprocess features shapes',
  'guidance': 'clip_x0',
  'samplers': (
    'create options takes table ddim ancestral analytic_ddpm analytic_ddim '
    'euler heun plms ipndm dpm_solver dpmpp_2s dpmpp_2m dpmpp_3m dpmpp_2m_sde '
    'unipc predictor_corrector adaptive solve Sampler'
  ),
  'samplers.adaptive': 'solve Took',
  'samplers.inversion': 'ddim_inversion slerp',
  'samplers.grid': 'create optimal',
  'samplers.calibration': 'Calibration',
  'samplers.plan': 'Plan create',
  'samplers.draw': 'drawer sample_keys to_uint8 to_float',
  'samplers.store': 'open_store fill load stream',
  'data': 'create open_set splits Source',
  'data.pipeline': 'batches heldout stream',
  'training.state': 'TrainState create abstract_state',
  'training.step': 'train_step heldout_loss',
  'training.optim': 'create',
  'training.sharding': 'make_mesh abstract gather_fsdp',
  'training.checkpoint': (
    'Checkpoints steps find_step save_params load_params load_common'
  ),
  'training.held': 'hold steps',
  'training.loop': 'train Every',
  'latents': 'noises carrier interpolation',
  'evaluation.features': 'Judge Batch Images images_of pixels passes sha256_of',
  'evaluation.classifier': 'train load fit',
  'evaluation.inception': 'load',
  'evaluation.frechet': (
    'Moments Gaussian moments_of merge distance bias simulated_bias read write '
    'caveats'
  ),
  'evaluation.kid': 'Estimate over_subsets squared_mmd caveats',
  'evaluation.inception_score': (
    'Sums Score splits_of nothing update score_of caveats'
  ),
  'evaluation.precision': 'Precision precision_recall radii caveats',
  'evaluation.neighbours': 'Nearest update share_nearer',
  'evaluation.looks': 'Looker Seen',
  'evaluation.measure': 'measure check protocol_of Options Measured',
  'evaluation.cards': 'create compare',
  'evaluation.statistics': 'read is_file',
  'evaluation.follow': 'follow curve_of',
  'evaluation.bits': 'measure How Found work',
  'evaluation.calibration': 'scored measure',
  'evaluation.sweep': 'parse longest best',
  'evaluation.page': 'write',
  'reproduction.published': 'find Recipe Row Band',
  'reproduction.health': 'loss distance ended told Finding',
  'reproduction.cost': 'flops_of shares estimate measured Work Place Hours',
  'reproduction.table': 'differences judge Check Verdict',
  'weights.inception': 'obtain convert read write from_torch from_graph',
  'weights.download': 'fetch sha256_of',
  'weights.pytorch': 'read',
  'weights.diffusers': 'read write to_params to_tensors Folder',
  'weights.settings': 'unet_of scheduler_of network_of process_of',
  'weights.official': 'read to_params Checkpoint',
  'pictures': 'grid columns trajectory neighbours save',
  'errors': 'UserError',
}

INTRO = """# API

Made from the docstrings by `docs/build_api.py`. Shapes are in brackets, B being
the batch; a time t runs from 0 to T-1, and -1 is clean data.
"""

SECTION = re.compile(r'(Args|Attributes|Returns|Raises):')


def listed():
  """(module, [(name to show, object)]) of all that is public."""
  for path, names in PUBLIC.items():
    module = importlib.import_module(f'diffusion_jax.{path}'.rstrip('.'))
    last = module.__name__.split('.')[-1]
    names = names.split()
    yield module, [(f'{last}.{name}', getattr(module, name)) for name in names]


def head(item) -> str:
  """A definition without its body, as it stands in the source."""
  source = textwrap.dedent(inspect.getsource(item))
  lines, node = source.splitlines(), ast.parse(source).body[0]
  parts = [node]
  if inspect.isclass(item):
    parts += [part for part in node.body if isinstance(part, ast.AnnAssign)]
    parts += [p for p in node.body if getattr(p, 'name', '') == '__init__']
  shown = []
  for part in parts:
    ends = part.body[0].lineno - 1 if hasattr(part, 'body') else part.end_lineno
    shown += lines[part.lineno - 1 : ends]
  return '```python\n' + '\n'.join(shown).rstrip(':') + '\n```'


def text(body: str) -> str:
  """Paragraphs; from what is indented or lined up in columns on, as it is."""
  out = []
  for block in re.split(r'\n\s*\n', inspect.cleandoc(body)):
    lines = block.splitlines()
    kept = [bool(re.search(r'^  |\S {2,}\S', line)) for line in lines]
    cut = kept.index(True) if True in kept else len(lines)
    if cut:
      out.append(prose(' '.join(lines[:cut])))
    if cut < len(lines):
      table = textwrap.dedent('\n'.join(lines[cut:]))
      out.append(f'```text\n{table}\n```')
  return '\n\n'.join(out)


def prose(line: str) -> str:
  """Words as Markdown: powers are not bold, papers are links."""
  parts = re.split(r'(`[^`]*`)', line)
  parts[::2] = [part.replace('**', r'\*\*') for part in parts[::2]]
  paper = r'[arXiv \1](https://arxiv.org/abs/\1)'
  return re.sub(r'arXiv (\d{4}\.\d{5})', paper, ''.join(parts))


def markdown(doc: str) -> str:
  """A docstring: its text, then a list for each of its sections."""
  parts, out = [('', [])], []
  for line in inspect.cleandoc(doc).splitlines():
    if match := SECTION.fullmatch(line):
      parts.append((match[1], []))
    else:
      parts[-1][1].append(line)
  for title, lines in parts:
    body = textwrap.dedent('\n'.join(lines)).strip('\n')
    entries = [] if title in ('', 'Returns') else re.split(r'\n(?=\S)', body)
    if title in ('Args', 'Attributes'):
      out.append('\n'.join(f'- {entry(lines)}' for lines in entries))
    elif entries:
      out.append(
        '\n\n'.join(f'**{title}** {entry(lines)}' for lines in entries)
      )
    else:
      out.append((f'**{title}** ' if title else '') + text(body))
  return '\n\n'.join(out)


def entry(lines: str) -> str:
  """'name: what it is', and lines that go with it."""
  name, meaning = lines.split(': ', 1)
  return f'`{name}`: ' + textwrap.indent(text(meaning), '  ').strip()


def anchor(name: str) -> str:
  return re.sub(r'[^\w-]', '', name.lower())


def methods(item) -> list:
  """A class's own, that say what they do."""
  return [
    method
    for name, method in vars(item).items()
    if name == '__call__' or name[0] != '_'
    if inspect.isfunction(method) and method.__doc__
  ]


def build() -> str:
  contents, out = [], []
  for module, entries in listed():
    name = module.__name__
    links = [f'[`{n.split(".")[-1]}`](#{anchor(n)})' for n, _ in entries]
    contents.append(f'- [{name}](#{anchor(name)}): {", ".join(links)}')
    out += [f'## {name}', markdown(module.__doc__)]
    for name, item in entries:
      source = Path(inspect.getsourcefile(item)).relative_to(ROOT)
      out += [f'### `{name}`', f'<sub>[`{source}`](../{source})</sub>']
      out += [head(item), markdown(item.__doc__)]
      for method in methods(item) if inspect.isclass(item) else ():
        out += [f'#### `{method.__qualname__}`']
        out += [head(method), markdown(method.__doc__)]
  return '\n\n'.join([INTRO.strip(), '\n'.join(contents), *out]) + '\n'


def main():
  page = build()
  if '--check' not in sys.argv:
    PAGE.write_text(page)
  elif not PAGE.exists() or PAGE.read_text() != page:
    sys.exit('docs/api.md is stale: run python docs/build_api.py')


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
