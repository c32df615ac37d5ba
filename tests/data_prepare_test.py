"""launch/prepare_data.sh."""

import subprocess

import binaries
import pytest


@pytest.mark.parametrize(
  ('arguments', 'code', 'must_name'),
  [
    ([], 2, 'prepare_data.sh NAME'),
    (['--help'], 0, 'prepare_data.sh NAME'),
    (['--frobnicate'], 2, '--frobnicate'),
    (['a', 'b', 'c'], 2, '3 arguments'),
  ],
)
def test_prepare_data_explains_itself(arguments, code, must_name):
  result = subprocess.run(
    ['bash', binaries.ROOT / 'launch' / 'prepare_data.sh', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == code
  assert must_name in (result.stderr if code else result.stdout)
