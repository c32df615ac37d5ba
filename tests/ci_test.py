""".ci/slow: which slow tests run, for how long, and what fails."""

import os
import shutil
import subprocess
import time

import binaries
import pytest

HOUR = 3600
LEFT_OUT = 'SKIPPED [1] tests/b_test.py: it is left out, after 10 minutes'


@pytest.fixture
def project(tmp_path):
  """Commits of some hours ago, and a stand-in for launch/test.sh.

  Returns:
    commit: (hours ago, test files that change) -> None.
    slow: (what the tests print, exit code) -> the finished script.
  """
  identity = {
    f'GIT_{who}_{what}': 'someone@example.com'
    for who in ('AUTHOR', 'COMMITTER')
    for what in ('NAME', 'EMAIL')
  }

  def git(*arguments, hours=0):
    date = f'{int(time.time() - hours * HOUR)} +0000'
    dates = {'GIT_AUTHOR_DATE': date, 'GIT_COMMITTER_DATE': date}
    subprocess.run(
      ['git', *arguments], cwd=tmp_path, check=True, capture_output=True,
      env={**os.environ, **identity, **dates},
    )  # fmt: skip

  def commit(hours, *names):
    for name in names:
      with (tmp_path / 'tests' / f'{name}_test.py').open('a') as file:
        file.write(f'# {hours}\n')
    git('add', '.')
    git('commit', '--allow-empty', '-m', f'{hours}', hours=hours)

  def slow(out='', code=0):
    (tmp_path / 'out').write_text(out)
    script = 'echo "minutes $DIFFUSION_JAX_TEST_MINUTES: $*"\ncat out\n'
    script += f'exit {code}'
    (tmp_path / 'launch' / 'test.sh').write_text(script)
    # What this suite was started with does not matter.
    given = {k: x for k, x in os.environ.items() if k != 'MINUTES'}
    return subprocess.run(
      ['bash', '.ci/slow'], cwd=tmp_path, capture_output=True, text=True,
      env=given,
    )  # fmt: skip

  for folder in ('.ci', 'launch', 'tests'):
    (tmp_path / folder).mkdir()
  shutil.copy(binaries.ROOT / '.ci' / 'slow', tmp_path / '.ci')
  git('init')
  return commit, slow


def test_without_history_it_is_said_that_none_run(project):
  commit, slow = project
  commit(1, 'a')
  done = slow(code=1)
  assert done.returncode == 0, done.stderr
  assert 'none, since this clone has no commit older than' in done.stdout


def test_what_has_not_changed_is_not_run(project):
  commit, slow = project
  commit(5, 'a')
  commit(1)
  done = slow(code=1)
  assert done.returncode == 0, done.stderr
  assert 'none, since no test file changed' in done.stdout


def test_a_slow_test_that_fails_fails_it(project):
  """Also where others do not come to an end."""
  commit, slow = project
  commit(9, 'a', 'b', 'c')
  commit(6, 'a')
  commit(2, 'b', 'c', 'd')
  for out, code, expected in (
    ('3 passed', 0, 0),
    ('3 deselected', 5, 0),
    (LEFT_OUT, 0, 0),
    ('FAILED tests/a_test.py::test_a', 1, 1),
    ('an unknown argument', 4, 4),
    (LEFT_OUT, 124, 0),
    (f'{LEFT_OUT}\nFAILED tests/a_test.py::test_a', 124, 1),
    ('ERROR tests/a_test.py::test_a', 137, 1),
  ):
    done = slow(out, code)
    assert done.returncode == expected, done
    assert out in done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith('minutes'))
    minutes, *flags = line.split()[1:]
    assert minutes == '10:'
    assert flags[:3] == ['-m', 'slow', '-rsfE']
    assert sorted(flags[3:]) == [f'tests/{name}_test.py' for name in 'bcd']
