"""docs/api.md: as the docstrings are, and they say what they must."""

import ast
import importlib.util
import inspect
import re
import sys
import textwrap

import binaries
import pytest

DOCS = binaries.ROOT / 'docs'


def load():
  path = DOCS / 'build_api.py'
  spec = importlib.util.spec_from_file_location('build_api', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


build_api = load()
PUBLIC = {
  name: item for _, entries in build_api.listed() for name, item in entries
}
FUNCTIONS = {
  name: item for name, item in PUBLIC.items() if inspect.isfunction(item)
}


def sections(doc) -> dict:
  parts = re.split(
    r'^(Args|Returns|Raises):$', inspect.cleandoc(doc), flags=re.M
  )
  return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_public_function_says_what_it_takes_and_raises(name):
  function = FUNCTIONS[name]
  told = sections(function.__doc__)
  named = re.findall(r'^  \*{0,2}(\w+): ', told.get('Args', ''), re.M)
  assert named == list(inspect.signature(function).parameters)
  body = ast.parse(textwrap.dedent(inspect.getsource(function)))
  if any(
    isinstance(node, ast.Raise) and 'UserError(' in ast.unparse(node)
    for node in ast.walk(body)
  ):
    assert '  UserError: ' in told.get('Raises', '')


@pytest.mark.parametrize('name', PUBLIC)
def test_the_page_shows_all_that_is_public(name):
  page = (DOCS / 'api.md').read_text()
  assert page.count(f'\n### `{name}`\n') == 1
  assert f'](#{build_api.anchor(name)})' in page


def test_the_page_is_as_the_docstrings_are(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'argv', ['build_api.py', '--check'])
  build_api.main()  # else: run python docs/build_api.py
  stale = tmp_path / 'api.md'
  stale.write_text(build_api.PAGE.read_text().replace('DDPM', 'DPM', 1))
  for page in (stale, tmp_path / 'none.md'):
    monkeypatch.setattr(build_api, 'PAGE', page)
    with pytest.raises(SystemExit, match='run python docs/build'):
      build_api.main()


def test_links_lead_somewhere():
  """To a heading of the page, or to a file of the project."""
  page = (DOCS / 'api.md').read_text()
  headings = re.findall(r'^#+ `?(.*?)`?$', page, re.M)
  anchors = [build_api.anchor(heading) for heading in headings]
  assert len(set(anchors)) == len(anchors)
  prose = re.sub(r'^ *```.*?^ *```$', '', page, flags=re.M | re.S)
  links = re.findall(r'\]\(([^)]*)\)', prose)
  assert len(links) > 2 * len(PUBLIC)
  for link in links:
    assert (
      link.removeprefix('#') in anchors
      or link.startswith('https://arxiv.org/abs/')
      or (DOCS / link).is_file()
    ), link


def a_function(first, *rest):
  """Does 2**3 things (arXiv 2006.11239).

  In two paragraphs, the second of which
  goes on:

    x = alpha x0
      + sigma eps

  Args:
    first: in
      words, or
      'a'    the first;
      'bcd'  the second.
    *rest: goes on in
      another line.

  Returns:
    [B], as `2**3`.

  Raises:
    UserError: never.
    KeyError: ever.
  """


def test_how_a_docstring_is_shown():
  assert build_api.head(a_function) == (
    '```python\ndef a_function(first, *rest)\n```'
  )
  assert build_api.markdown(a_function.__doc__) == (
    r"""Does 2\*\*3 things ([arXiv 2006.11239](https://arxiv.org/abs/2006.11239)).

In two paragraphs, the second of which goes on:

```text
x = alpha x0
  + sigma eps
```

- `first`: in words, or

  ```text
  'a'    the first;
  'bcd'  the second.
  ```
- `*rest`: goes on in another line.

**Returns** [B], as `2**3`.

**Raises** `UserError`: never.

**Raises** `KeyError`: ever."""
  )
