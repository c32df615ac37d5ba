"""What may lie in a folder in which a run, or another output, begins."""

import re

from diffusion_jax.system import files

# The own files of a run that is not there yet: a start was killed, or has been
# prepared on another disk.
BEGUN = {'.lock', 'data.json', 'init_from.json', 'parts', 'saved.json'}
# What shells, schedulers, editors, TensorBoard and file systems leave, and
# scripts and notes that belong to the run. They are no data and no other run.
BESIDE = re.compile(
  r"""\..* | lost\+found | @eaDir | \#(snapshot|recycle) | \$RECYCLE\.BIN
  | System\ Volume\ Information | Thumbs\.db | desktop\.ini | aquota\..*
  | logs? | (slurm|nohup|std(out|err)|core|events\.out\.tfevents|nvidia).*
  | wandb | mlruns | tensorboard | tb(_logs)? | lightning_logs
  | .*\.(log|out|err|txt|md|csv|[oe]\d+|tmp|lock|pid|swp|bak|orig)
  | .*\.(sh|bash|sbatch|slurm|pbs|job|cmd|py|ya?ml|toml|ini|cfg|env|patch|diff)
  | .*~ | readme | notes?""",
  re.VERBOSE | re.IGNORECASE,
)


def foreign(path: files.Path) -> set[str]:
  """The names in a folder that are neither logs nor notes, see BESIDE.

  Args:
    path: the folder; none if it does not exist.
  """
  if not path.exists():
    return set()
  return {x for x in files.entries(path) if not BESIDE.fullmatch(x)}


def in_the_way(path: files.Path) -> list[str]:
  """The names in a folder that a new run must not mix with.

  Args:
    path: the folder; [] if there is none.
  """
  return sorted(
    name
    for name in foreign(path) - BEGUN
    if not (name == 'checkpoints' and _is_empty(path / name))
  )


def _is_empty(folder) -> bool:
  return folder.is_dir() and not foreign(folder)
