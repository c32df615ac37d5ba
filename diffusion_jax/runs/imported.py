"""Runs that come from a pipeline of diffusers: how it samples."""

from diffusion_jax import runs


def sampling(workdir, asked: dict) -> dict:
  """How to sample from a run: as is asked, or as its pipeline does.

  Args:
    workdir: the run's folder.
    asked: the options of a plan; None for those that are not given.

  Returns:
    The options. If no sampler is asked for, those that are not given are of the
    pipeline of diffusers that the run comes from, if it comes from one.
  """
  if asked.get('sampler') is not None:
    return asked
  usual = (runs.conversion(workdir) or {}).get('sampling') or {}
  return {**asked, **{k: x for k, x in usual.items() if asked.get(k) is None}}
