"""What may lie in a folder in which a run begins."""

import re

from diffusion_jax.system import files

# The own files of a run that is not there yet: a start was killed, or has been
# prepared on another disk.
BEGUN = {'.lock', 'data.json', 'init_from.json', 'saved.json'}
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


def in_the_way(path: files.Path) -> list[str]:
  """The names in a folder that a new run must not mix with.

  Args:
    path: the folder; [] if there is none.
  """
  if not path.exists():
    return []
  return sorted(
    name
    for name in files.entries(path) - BEGUN
    if not BESIDE.fullmatch(name)
    and not (name == 'checkpoints' and _is_empty(path / name))
  )


def _is_empty(folder) -> bool:
  return folder.is_dir() and not any(
    not BESIDE.fullmatch(name) for name in files.entries(folder)
  )
