"""Metrics: a JSON object per line, and TensorBoard event files."""

import json
import math
import time

import numpy as np

from diffusion_jax.objectives.objective import Mean
from diffusion_jax.system import files, jsonl

ROWS = 'metrics.jsonl'
EVERY = 30  # seconds


def read(path) -> list[dict]:
  """Reads the whole rows of a metrics file, see system/jsonl.py."""
  return jsonl.read(path, is_row)


def is_row(value: dict) -> bool:
  """Whether an object is a row: numbers, among them its step."""
  numbers = (type(number) in (int, float) for number in value.values())
  return type(value.get('step')) is int and all(numbers)


def truncate(path, step: int) -> None:
  """Drops the rows after `step`, which will be computed again.

  Damaged lines are dropped as well. The file is replaced atomically: a kill
  leaves either the old or the new one.
  """
  path = files.at(path)
  if not path.exists():
    return
  kept = [json.dumps(row) + '\n' for row in read(path) if row['step'] <= step]
  with files.replacing(path) as file:
    file.write(''.join(kept).encode())


def divided(values: dict) -> dict:
  """A step's metrics on the host, as numbers; means over nothing are left out.

  Args:
    values: name -> a number, or a `Mean` of NumPy scalars.
  """
  return {
    name: value.total / value.count if isinstance(value, Mean) else value
    for name, value in values.items()
    if not isinstance(value, Mean) or value.count
  }


class Mute:
  """Replaces the writer in all processes but the first."""

  def _nothing(self, *_) -> None:
    pass

  write = picture = flush = close = _nothing


class Writer:
  """Appends rows to `metrics.jsonl` and to TensorBoard's events.

  In a bucket, `flush` uploads both files again, and `write` uploads the rows
  when the last upload is more than EVERY seconds ago.

  Args:
    workdir: the folder of both files.
    step: the checkpoint that the run resumes from; later rows are dropped.
  """

  def __init__(self, workdir, step: int):
    # Imported here, for it imports torch where that is installed.
    import tensorboardX

    self._x = tensorboardX
    workdir = files.at(workdir)
    truncate(workdir / ROWS, step)
    folder, self._put = files.growing(workdir, ROWS)
    self._file, self._then = (folder / ROWS).open('a'), time.monotonic()
    again = any(workdir.glob('events.out.tfevents.*'))
    # Not a SummaryWriter: on a full disk its thread dies, and later writes
    # block forever.
    self._board = tensorboardX.event_file_writer.EventsWriter(
      str(folder / 'events')
    )
    if again:
      # Makes TensorBoard ignore what an earlier start wrote for these steps.
      log = tensorboardX.proto.event_pb2.SessionLog
      self._event(step + 1, session_log=log(status=log.START))

  def write(self, step: int, values: dict) -> None:
    """Writes a row; values that are not finite are left out."""
    values = {'loss': values['loss'], **values}  # loss first, for readability
    values = {k: float(v) for k, v in values.items() if math.isfinite(v)}
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    if time.monotonic() - self._then > EVERY:
      self._put(ROWS)
      self._then = time.monotonic()
    for name, value in values.items():
      self._event(step, summary=self._x.summary.scalar(name, value))

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a uint8 [H, W, C] image to TensorBoard."""
    self._event(
      step, summary=self._x.summary.image(name, image, dataformats='HWC')
    )

  def flush(self) -> None:
    """Writes out all buffered events and, in a bucket, uploads both files."""
    self._board.flush()
    self._put()

  def close(self) -> None:
    self._file.close()
    self._board.close()
    self._put()

  def _event(self, step: int, **what) -> None:
    event = self._x.proto.event_pb2.Event
    self._board.write_event(event(wall_time=time.time(), step=step, **what))
