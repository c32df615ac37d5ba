"""Packaging: metadata, dependencies and extras."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
  name='diffusion_jax',
  version='0.1.0',
  description=(
    'Train and sample diffusion models in JAX, on CPUs, GPUs and TPUs'
  ),
  long_description=Path('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *find_packages(include=['diffusion_jax', 'diffusion_jax.*']),
    'diffusion_jax.configs',
  ],
  # configs/ stands at the top, where people look for it, and is shipped
  # inside the package, where `--config=NAME` finds it.
  package_dir={
    'diffusion_jax': 'diffusion_jax',
    'diffusion_jax.configs': 'configs',
  },
  package_data={'': ['*.jinja']},  # templates
  # Each lower bound is the version that the suite was run with.
  install_requires=[
    'absl-py>=2.3',
    'diffrax>=0.7.2',
    'etils[epath]>=1.15',  # gs://, which Orbax reaches by it too
    'filelock>=3.16',  # JAX locks its cache of compiled programs by it
    'flax>=0.12.8',
    'flatbuffers>=25.12',  # files of jax.export
    'fsspec>=2026.9',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jinja2>=3.1.6',
    'matplotlib>=3.10',
    'ml_collections>=1.1.0',
    'numpy>=2.2',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=11.3',
    'safetensors>=0.8',
    'scikit-learn>=1.7',
    'tensorboardX>=2.6.4',
    'tensorflow-datasets>=4.9.10',
    'tokenizers>=0.23.3',  # CLIP's byte-pair encoding, without torch
    'tqdm>=4.67',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10.2'],
    'cuda': ['jax[cuda12]>=0.10.2'],
    # Runs in a bucket: gs:// as a workdir or an output.
    'gcs': ['gcsfs>=2026.10', 'google-cloud-storage>=3.17'],
    # TensorFlow prepares data sets (launch/prepare_data.sh), nothing else.
    'prepare': [
      'tensorflow-cpu>=2.20; platform_system != "Darwin"',
      'tensorflow>=2.20; platform_system == "Darwin"',
      'importlib_resources',
      'lmdb>=1.6',  # LSUN
    ],
    'test': [
      'import-linter>=2.17',
      'pytest>=8.4',
      'pytest-xdist>=3.8',
      'ruff>=0.17',
      'setuptools>=77',  # what it would ship is tested
    ],
    'docs': ['pdoc>=16'],
    'benchmarks': ['scikit-image>=0.26'],  # what edits are compared with
    # Pinned: the golden files come from these.
    'parity': [
      'torch==2.13.0',
      'diffusers==0.42.1',
      'transformers==5.24.0',
      'peft==0.21.2',  # LoRA in diffusers
    ],
  },
)
