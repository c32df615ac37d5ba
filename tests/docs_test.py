"""README and docs: links lead somewhere, commands have flags that exist."""

import re
from pathlib import Path

import binaries
import pytest

ROOT = binaries.ROOT
README = ROOT / 'README.md'
DOCS = ROOT / 'docs'
PAGES = [
  README, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md',
  ROOT / 'launch' / 'README.md', *sorted(DOCS.glob('*.md')),
]  # fmt: skip
PACKAGE = ROOT / 'diffusion_jax'
BINARIES = sorted(
  path.stem
  for path in PACKAGE.glob('*.py')
  if '\nif __name__' in path.read_text()
)


def name(path):
  return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
  """As GitHub makes them from headings."""
  heads = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.S),
                     re.M)  # fmt: skip
  return {
    re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads
  }


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
  text = page.read_text()
  targets = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text)
  for target in (''.join(pair) for pair in targets):
    if '://' in target:
      continue
    path, _, anchor = target.partition('#')
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), target
    if anchor:
      assert anchor in anchors(there.read_text()), target


def test_the_readme_is_short_and_names_every_package():
  lines = README.read_text().splitlines()
  assert len(lines) <= 150
  assert max(map(len, lines)) <= 80
  packages = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  for page in (README, DOCS / 'code.md'):
    for package in packages - {'configs'}:
      assert f'{package}/' in page.read_text(), (page, package)
  for binary in BINARIES:
    assert re.search(rf'\b{binary}\b', README.read_text()), binary


def test_the_index_lists_every_page():
  index = (DOCS / 'README.md').read_text()
  for path in DOCS.glob('*.md'):
    if path.name != 'README.md':
      assert f'({path.name})' in index, path.name


def test_files_that_are_named_exist():
  """`samplers/ddim.py` in docs/code.md, `/samplers/ddim.py` in CONTRIBUTING."""
  for page, pattern in (
    (DOCS / 'code.md', r'`([a-z_]+/[a-z_]+\.py)`'),
    (README, r'`([a-z_]+/[a-z_]+\.py)`'),
    (ROOT / 'CONTRIBUTING.md', r'`/([a-z_/]+\.py)`'),
  ):
    found = re.findall(pattern, page.read_text())
    assert found
    for path in found:
      assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


def commands(page: Path) -> list[tuple[str, str]]:
  """(binary, its arguments) of all commands on a page."""
  text = page.read_text().replace('\\\n', ' ')
  short = rf'`({"|".join(BINARIES)}) ([^`\n]*)'
  return re.findall(r'-m diffusion_jax\.(\w+)([^#`\n]*)', text) + re.findall(
    short, text
  )


def test_commands_have_flags_that_exist():
  used = {}
  for page in PAGES:
    for binary, arguments in commands(page):
      names = re.findall(
        r'--([a-z_]+)', re.sub(r'--config\.\S+', '', arguments)
      )
      # A task of `edit` has flags of its own.
      task = arguments.split()[:1] if binary == 'edit' else []
      task = [word for word in task if word.islower() and word.isalpha()]
      if binary != 'edit' or task:
        used.setdefault((binary, *task), set()).update(names)
  assert {binary for binary, *_ in used} <= set(BINARIES)
  assert len(used) >= 10
  running = {one: binaries.start(*one, '--help') for one in used}
  for binary, one in running.items():
    known = set(re.findall(r'^  --(?:\[no\])?(\w+)', one.end().out, re.M))
    known |= {f'no{flag}' for flag in known}
    assert used[binary] <= known, binary
