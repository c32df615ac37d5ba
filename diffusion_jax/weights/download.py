"""Downloads a file, verified by its hash."""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

PIECE = 2**20  # bytes
PATIENCE = 60  # seconds that a server may take to answer


def fetch(
  directory,
  *,
  url: str,
  sha256: str,
  largest: int,
  on_bytes: Callable[[int], None] = lambda count: None,
):
  """Downloads a file, unless it exists.

  Args:
    directory: the folder to download to; the file gets the last part of the URL
      as its name.
    url: the URL of the file.
    sha256: the file's hash, 64 hexadecimal digits.
    largest: the largest number of bytes to accept.
    on_bytes: called with the number of bytes of each piece received.

  Returns:
    The path of the file, which is created only once complete and verified.

  Raises:
    UserError: the download fails, or gives another file.
  """
  path = files.at(directory) / url.rpartition('/')[2]
  if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
    return path
  advice = f'download {url} by other means, and give the file'
  digest, count = hashlib.sha256(), 0
  try:
    with (
      urllib.request.urlopen(url, timeout=PATIENCE) as answer,
      files.replacing(files.make(directory) / path.name) as file,
    ):
      while piece := answer.read(PIECE):
        digest.update(piece)
        count += len(piece)
        if count > largest:
          raise UserError(f'{url} is more than {largest} bytes: {advice}')
        file.write(piece)
        on_bytes(len(piece))
      if digest.hexdigest() != sha256:
        raise UserError(
          f'{url} gave {count} bytes with the SHA-256 '
          f'{digest.hexdigest()[:8]}, not {sha256[:8]}: {advice}'
        )
  except (OSError, http.client.HTTPException) as e:
    raise UserError(f'{url} cannot be downloaded ({e}): {advice}') from e
  return path
