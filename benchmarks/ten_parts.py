"""Parts of a call that ends by the clock: what ran, and how it ended.

Each part is one of the project's programs in its own process.
"""

import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.reproduction import stages
from diffusion_jax.system import files, terminal

DONE, CUT, FAILED, LEFT_OUT = 'done', 'cut', 'failed', 'left out'
GRACE = 20.0  # seconds for a part to save after it is told to stop


class Record:
  """What a call has done so far, kept in two files after every part.

  Attributes:
    result: as in the JSON file: 'parts', each with its name, its seconds, how
      it ended, why, and whether a cut is a failure of the call; and more.
    text: title -> lines, as in the text file, before the table of the parts.

  Args:
    folder: the folder of the files.
    name: of the files, without their suffix.
    head: what the JSON file holds at first.
  """

  def __init__(self, folder: Path, name: str, head: Mapping):
    self._path = folder / f'{name}.json'
    self.result = {**head, 'parts': []}
    self.text: dict[str, list[str]] = {}

  @property
  def failed(self) -> bool:
    """Whether a part failed, or one that was due did not end."""
    return any(
      part['how'] == FAILED or (part['due'] and part['how'] != DONE)
      for part in self.result['parts']
    )

  def part(
    self,
    name: str,
    work: Callable[[dict], None],
    seconds: float,
    due: bool = True,
  ) -> None:
    """Does a part, and records it; an error ends the part, not the call.

    Args:
      name: of the part.
      work: does it; takes the record of the part, whose 'how' and 'why' it may
        change. TimeoutError means that there was no time.
      seconds: left for it; with none left, it is left out.
      due: whether the call is incomplete without it.
    """
    found = {'name': name, 'how': DONE, 'why': '', 'due': due}
    start = time.monotonic()
    terminal.say(f'--- {name}')
    try:
      if seconds <= 0:
        raise TimeoutError
      work(found)
    except TimeoutError:
      found['how'] = LEFT_OUT
    except stages.Failed as e:
      why = e.told.strip().removeprefix('error: ') or str(e).partition(';')[0]
      found |= {'how': FAILED, 'why': why}
    except Exception as e:
      line = ' '.join(str(e).split())[:300]
      found |= {'how': FAILED, 'why': f'{type(e).__name__}: {line}'}
    found['seconds'] = round(time.monotonic() - start, 1)
    self.result['parts'].append(found)
    terminal.say(f'--- {name}: {found["how"]}, {found["seconds"]} s')
    self.keep()

  def keep(self) -> None:
    """Writes both files."""
    files.write_json(self._path, self.result)
    with files.replacing(self._path.with_suffix('.txt')) as file:
      file.write(f'{self.summary()}\n'.encode())

  def summary(self) -> str:
    """The text file."""
    rows = [
      [part['name'], f'{part["seconds"]:.0f}', part['how'], part['why']]
      for part in self.result['parts']
    ]
    lines = [*self.result['about'], '']
    for title, block in self.text.items():
      lines += [title, *block, '']
    return '\n'.join(
      [*lines, *(x.rstrip() for x in terminal.table(HEADS, rows))]
    )


HEADS = ('part', 'seconds', 'ended', '')


def run(
  command: Sequence[str],
  seconds: float,
  watch: Callable[[], None] = lambda: None,
  parse: Callable[[str], Any] | None = None,
) -> Any:
  """Runs a program; returns its result, None if its time was up.

  Args:
    command: arguments for Python.
    seconds: until it is told to stop.
    watch: called every second; an exception stops the program.
    parse: see `stages.run`.

  Raises:
    Failed: it ended with an error.
    TimeoutError: there is no time to start it.
  """
  if seconds <= 0:
    raise TimeoutError
  terminal.say(f'$ python {shlex.join(map(str, command))}')
  how = {} if parse is None else {'parse': parse}
  return stages.run(
    [*map(str, command)], stop=signal.SIGTERM, every=1.0, grace=GRACE,
    deadline=time.monotonic() + seconds, watch=watch, **how,
  )  # fmt: skip
