"""Draws, keeps and shows the answers of `edit`."""

import json

import numpy as np
from absl import flags
from PIL import Image

from diffusion_jax.cli import edit_tasks
from diffusion_jax.evaluation import cards
from diffusion_jax.objectives import similarity
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import edits, folder
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
KEY = 'diffusion_jax_edit'  # the text chunk of an answer
ROWS, ANSWERS = 8, 4  # most pictures, and answers of each, on overview.png


def fill(trained, task: str, groups, output: files.Path) -> int:
  """Draws the answers that the folder lacks; returns how many were drawn.

  Args:
    trained: the network, a `Trained`.
    task: the task.
    groups: the pictures, see `edit_inputs.groups`.
    output: the folder.

  Raises:
    UserError: the folder holds something else.
  """

  def begin():
    _open(output, _protocol(trained, task, groups[0].edit))
    return [
      [pair for pair in _pairs(group) if not _is_there(*one, *pair)]
      for group in groups
      for one in [(trained, task, group, output)]
    ]

  absent = distributed.on_first(begin)
  total = sum(len(group.names) for group in groups) * FLAGS.samples
  missing = sum(map(len, absent))
  if not missing:
    return 0
  each = groups[0].edit
  most = max(group.edit.tiles for group in groups)
  tiled = f' of up to {_count(most, "tile")}' if each.tile else ''
  terminal.say(
    f'drawing {_count(missing, "answer")} by {each.method}, '
    f'{_count(each.evaluations, "evaluation")}{tiled} each, into {output}'
  )
  with terminal.Progress(
    *(task, total, total - missing, 'answers'),
    kept=lambda done: f'{done} answers are kept in {output}',
  ) as progress:
    for group, pairs in zip(groups, absent, strict=True):
      for first in range(0, len(pairs), FLAGS.batch_size):
        part = np.array(pairs[first : first + FLAGS.batch_size])
        given = {name: x[part[:, 0]] for name, x in group.rows.items()}
        found = edits.answer(
          trained, group.edit, given, part[:, 1],
          min(FLAGS.batch_size, len(pairs)),
        )  # fmt: skip
        if distributed.is_first():
          _save(trained, task, group, output, part, found.images)
        progress.update(len(part))
  return missing


def _open(output, protocol) -> None:
  """Begins a folder, or checks that it is of the same protocol."""
  path = output / 'edit.json'
  if path.is_file():
    try:
      there = dict(json.loads(path.read_text())['protocol'])
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f'{path} is damaged: choose another --output') from e
    own = json.loads(json.dumps(protocol))
    for name in sorted(own.keys() | there.keys()):
      if own.get(name) != there.get(name):
        raise UserError(
          f'{output} holds answers with {name}={there.get(name)!s:.60}, not '
          f'{own.get(name)!s:.60}: choose another --output'
        )
    return
  if foreign := sorted(folder.foreign(output)):
    raise UserError(
      f'{output} is not empty and holds no answers (in the way: {foreign[0]}): '
      'choose another --output'
    )
  files.make(output)
  files.write_json(path, {'protocol': protocol})


def _protocol(trained, task, edit) -> dict:
  """All that answers depend on but their pictures."""
  subject = cards.subject_of(trained)
  subject.pop('workdir')
  how = edit.protocol()
  how.pop('image_shape')
  given = {name: FLAGS[name].value for name in edit_tasks.OWN[task]}
  return {'task': task, **subject, **how, 'given': given}


def _pairs(group) -> list[tuple[int, int]]:
  """(place of the picture, number of the answer) of all answers."""
  return [(i, k) for i in range(len(group.names)) for k in range(FLAGS.samples)]


def path_of(output, group, i: int, k: int) -> files.Path:
  """The file of an answer.

  Args:
    output: the folder.
    group: the group of the picture.
    i: its place in the group.
    k: the number of the answer.
  """
  return output / f'{group.names[i]}_{k}.png'


def _address(trained, task, group, i, k) -> dict[str, str]:
  """The text chunk of an answer."""
  facts = {
    'workdir': str(trained.workdir),
    **_protocol(trained, task, group.edit),
    'image_shape': group.edit.image_shape,
    'noise': round(127.5 * float(group.rows['noise'][i]), 4),
    'input': f'{group.rows["input"][i]:08x}',
    'index': k,
  }
  if 'strength' in group.rows:
    facts['strength'] = round(float(group.rows['strength'][i]), 6)
  return {KEY: json.dumps(facts)}


def _is_there(trained, task, group, output, i, k) -> bool:
  """Whether an answer has been drawn, for the same picture."""
  path = path_of(output, group, i, k)
  if not path.is_file():
    return False
  try:
    with path.open('rb') as file, Image.open(file, formats=['PNG']) as image:
      there = json.loads(image.text.get(KEY, ''))
  except (*pictures.DAMAGED, AttributeError):
    return False
  own = json.loads(_address(trained, task, group, i, k)[KEY])
  return {**there, 'workdir': ''} == {**own, 'workdir': ''}


def _save(trained, task, group, output, part, images) -> None:
  for (i, k), image in zip(part.tolist(), images, strict=True):
    text = _address(trained, task, group, i, k)
    pictures.save(path_of(output, group, i, k), image, text)


def write(trained, task: str, groups, output: files.Path, drawn: int) -> dict:
  """Writes edit.json, overview.png and the spread; returns the result.

  Args:
    trained: the network, a `Trained`.
    task: the task.
    groups: the pictures.
    output: the folder.
    drawn: how many answers were drawn now.
  """
  found, spread = [], files.make(output / 'spread') if FLAGS.samples > 1 else 0
  for group in groups:
    for i, name in enumerate(group.names):
      answers = np.stack([
        pictures.read(path_of(output, group, i, k))
        for k in range(FLAGS.samples)
      ])  # fmt: skip
      found.append(_measured(group, i, answers))
      if spread:
        pictures.save(spread / f'{name}.png', spread_of(answers))
  pictures.save(output / 'overview.png', _overview(groups, output))
  each = groups[0].edit
  result = {
    'protocol': _protocol(trained, task, each),
    'output': str(output),
    'drawn': drawn,
    'samples': FLAGS.samples,
    'evaluations': each.evaluations,
    'pictures': found,
  }
  files.write_json(output / 'edit.json', result)
  return result


def _measured(group, i, answers) -> dict:
  """The numbers of a picture's answers, and of their mean."""
  given = {name: x[[i] * len(answers)] for name, x in group.rows.items()}
  off = edits.residuals(group.edit, given, answers)
  told = {
    'name': group.names[i],
    'input': f'{group.rows["input"][i]:08x}',
    'image_shape': list(group.edit.image_shape),
    **({'tiles': group.edit.tiles} if group.edit.tile else {}),
    'noise': 127.5 * float(group.rows['noise'][i]),
    'residual' if group.edit.kind else 'change': off.tolist(),
  }
  if len(answers) > 1:
    told['spread'] = float(np.sqrt(answers.var(0, ddof=1).mean()))
  if group.originals is not None:
    whole = np.float64(group.originals[[i] * len(answers)])
    for name, measure in (('psnr', similarity.psnr), ('ssim', similarity.ssim)):
      near = measure(np.float64(answers), whole, 255.0, np)
      told[name] = near.tolist()
      if len(answers) > 1:
        mean = answers.mean(0, keepdims=True)
        told[f'{name}_of_mean'] = float(measure(mean, whole[:1], 255.0, np)[0])
  return told


def spread_of(answers: np.ndarray) -> np.ndarray:
  """The standard deviation of answers at each pixel, bright where they differ.

  Args:
    answers: uint8 [samples, H, W, C], two or more.

  Returns:
    uint8 [H, W, 1]; white is a deviation of 64 levels or more.
  """
  deviation = np.sqrt(answers.var(0, ddof=1).mean(-1, keepdims=True))
  return np.clip(np.round(deviation * 255 / 64), 0, 255).astype(np.uint8)


def _overview(groups, output) -> np.ndarray:
  """The first pictures, those of each size below one another."""
  each = max(1, ROWS // len(groups))
  return pictures.below(
    [_answered(group, output, each) for group in groups[:ROWS]]
  )


def _answered(group, output, most: int) -> np.ndarray:
  """What is known, answers, their spread and the original, of the first."""
  count = range(min(most, len(group.names)))
  shown = range(min(ANSWERS, FLAGS.samples))
  answers = np.stack([
    [pictures.read(path_of(output, group, i, k)) for i in count]
    for k in range(FLAGS.samples)
  ])  # fmt: skip
  frames = [group.shown[: len(count)], *answers[: len(shown)]]
  heads = ['known', *(f'answer {k}' for k in shown)]
  if FLAGS.samples > 1:
    maps = [spread_of(answers[:, i]) for i in count]
    frames.append(np.broadcast_to(np.stack(maps), frames[0].shape))
    heads.append('spread')
  if group.originals is not None:
    frames.append(group.originals[: len(count)])
    heads.append('original')
  return pictures.columns(np.stack(frames), heads)


def text(result: dict) -> str:
  """The result as a table for people.

  Args:
    result: see `write`.
  """
  keys = ['noise', 'residual', 'change', 'spread', 'psnr', 'psnr_of_mean']
  keys += ['ssim']
  keys = [key for key in keys if key in result['pictures'][0]]
  rows = [
    (one['name'], *(f'{np.mean(one[key]):.4g}' for key in keys))
    for one in result['pictures'][:ROWS]
  ]
  means = [
    f'{np.mean([np.mean(one[key]) for one in result["pictures"]]):.4g}'
    for key in keys
  ]
  if len(result['pictures']) > 1:
    rows.append(('all', *means))
  table = terminal.table(['picture', *keys], rows)
  return '\n'.join([
    *table, '',
    f'{_count(len(result["pictures"]), "picture")}, '
    f'{_count(result["samples"], "answer")} each, {result["drawn"]} drawn now; '
    f'picture: {result["output"]}/overview.png',
  ])  # fmt: skip


def _count(number: int, what: str) -> str:
  return f'{number} {what}' + 's' * (number != 1)
