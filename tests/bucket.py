"""A bucket for the tests: as much of Google's storage API as is asked for.

Objects lie in this process; binaries reach them by HTTP, through gcsfs,
TensorStore and google-cloud-storage, as they would reach the real ones.
"""

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

NAME = 'runs-of-ours'


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def handle(self):
    with contextlib.suppress(ConnectionError):  # they hang up when killed
      super().handle()

  def do_GET(self):
    match self._names():
      case [bucket, *_] if bucket != NAME:
        self._answer(404, {'error': {'code': 404, 'message': 'no bucket'}})
      case [_]:
        self._answer(200, {'kind': 'storage#bucket', 'name': NAME, 'id': NAME})
      case [_, '']:
        self._list()
      case [_, name]:
        self._read(name)

  def do_POST(self):
    (bucket, name), body = self._names(), self._body()
    name = name or self.query.get('name', '')
    kind = self.query.get('uploadType', 'media')
    if bucket != NAME:
      self._answer(404, {'error': {'code': 404, 'message': 'no bucket'}})
    elif kind == 'resumable':
      name = name or json.loads(body)['name']
      query = urllib.parse.urlencode({'name': name, 'uploadType': 'media'})
      there = f'http://{self.headers["Host"]}/upload/storage/v1/b/{NAME}/o'
      self.server.unfinished[name] = b''
      self._answer(200, {}, {'Location': f'{there}?{query}'})
    elif kind == 'multipart':
      boundary = re.search('boundary="?([^";]+)', self.headers['Content-Type'])
      _, facts, content, _ = (
        part.partition(b'\n\n')[2].removesuffix(b'\n')
        for part in body.split(f'--{boundary[1]}'.encode())
      )
      self._write(json.loads(facts)['name'], content)
    else:
      self._write(name, body)

  def do_PUT(self):
    body, name = self._body(), self.query['name']
    self.server.unfinished[name] += body
    if re.search(r'/\*$', self.headers.get('Content-Range', '')):
      end = len(self.server.unfinished[name]) - 1
      self._answer(308, None, {'Range': f'bytes=0-{end}'})
    else:
      self._write(name, self.server.unfinished.pop(name))

  def do_DELETE(self):
    _, name = self._names()
    there = self.server.objects.pop(name, None)
    self._answer(204 if there else 404, None)

  def _list(self):
    prefix = self.query.get('prefix', '')
    delimiter = self.query.get('delimiter')
    start, end = (self.query.get(f'{k}Offset', '') for k in ('start', 'end'))
    items, prefixes = [], []
    for name in sorted(self.server.objects):
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter or '\0')
      if found:
        prefixes.append(prefix + head + delimiter)
      else:
        items.append(self._facts(name))
    self._answer(200, {'items': items, 'prefixes': [*dict.fromkeys(prefixes)]})

  def _read(self, name):
    content, generation = self.server.objects.get(name, (None, 0))
    unchanged = self.query.get('ifGenerationNotMatch') == str(generation)
    if content is None:
      self._answer(404, {'error': {'code': 404, 'message': 'no object'}})
    elif unchanged:
      self._answer(304, None)
    elif self.query.get('alt') != 'media':
      self._answer(200, self._facts(name))
    else:
      headers = {'x-goog-generation': str(generation)}
      span = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
      if span:
        first, last = int(span[1]), int(span[2] or len(content) - 1)
        last = min(last, len(content) - 1)
        headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        content = content[first : last + 1]
      self._answer(206 if span else 200, content, headers)

  def _write(self, name, content):
    wanted = self.query.get('ifGenerationMatch')
    _, generation = self.server.objects.get(name, (None, 0))
    if wanted is not None and int(wanted) != generation:
      self._answer(412, {'error': {'code': 412, 'message': 'changed'}})
      return
    self.server.objects[name] = (content, next(self.server.generations))
    self._answer(200, self._facts(name))

  def _facts(self, name):
    content, generation = self.server.objects[name]
    return {
      'kind': 'storage#object', 'name': name, 'bucket': NAME,
      'size': str(len(content)), 'generation': str(generation),
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'updated': f'2026-01-01T{generation // 3600 % 24:02}:'
                 f'{generation // 60 % 60:02}:{generation % 60:02}.000Z',
    }  # fmt: skip

  def _names(self):
    """[bucket], [bucket, ''] for all objects, or [bucket, object]."""
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    names = re.fullmatch(r'.*/b/([^/]*)(?:/o(?:/(.*))?)?', url.path)
    bucket, name = names.groups()
    if '/o' not in url.path.partition('/b/')[2]:
      return [bucket]
    return [bucket, urllib.parse.unquote(name or '')]

  def _body(self):
    self._names()
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _answer(self, code, content, headers=()):
    if isinstance(content, dict):
      content = json.dumps(content).encode()
    self.send_response(code)
    for key, value in dict(headers).items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(content or b'')))
    self.end_headers()
    self.wfile.write(content or b'')

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def served():
  """(name -> (content, generation), the environment that leads to them)."""
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.objects, server.unfinished = {}, {}
    server.generations = itertools.count(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    yield (
      server.objects,
      {
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      },
    )
    server.shutdown()
