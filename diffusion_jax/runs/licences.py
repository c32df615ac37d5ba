"""Licences of weights, which go where the weights go.

A run keeps them in licences/: an import copies those of the folder, and a run
those of the parts that it does not train and of the run that it starts from.
Exports copy them into the folder.
"""

import re

from diffusion_jax.system import files, terminal
from diffusion_jax.weights import places

FOLDER = 'licences'
LARGEST = 2**20  # bytes
NAMES = re.compile(r'(licen[cs]e|copying|notice)\b', re.IGNORECASE)


def of(path) -> dict[str, bytes]:
  """The licences of a run, or of a folder of weights: name -> content.

  Args:
    path: the run, the folder, or the folder of a network in a pipeline's.
  """
  path = files.absolute(files.at(path).expanduser())
  around = [path.parent] * (path.parent / places.PIPELINE).is_file()
  found = {}
  for folder in (*around, path, path / FOLDER):
    for name in sorted(files.entries(folder)) if folder.is_dir() else ():
      if not (NAMES.match(name) and (folder / name).is_file()):
        continue
      try:
        content = (folder / name).read_bytes()
      except OSError as e:
        terminal.say(f'{folder / name} cannot be read ({e}) and is left out')
        continue
      if len(content) > LARGEST:
        size = f'{len(content):,} bytes'
        terminal.say(f'{folder / name} is left out: {size} are no licence')
      else:
        found[name] = content
  return found


def write(target, found: dict[str, bytes], part: str = 'other') -> None:
  """Writes licences into a folder; those that are there stay.

  Args:
    target: the folder; nothing is made if there are no licences.
    found: from `of`.
    part: what they are of, for the name of one that differs from the one that
      is there.
  """
  for name, content in found.items():
    path = files.make(files.at(target)) / name
    if path.exists() and path.read_bytes() != content:
      path = path.with_name(f'{name}.{part}')
    with files.replacing(path) as file:
      file.write(content)
