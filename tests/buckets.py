"""Buckets in memory, behind as much of Google Cloud Storage's JSON API as is used.

The real clients talk to it: gcsfs and TensorStore. As there, an object is seen when it
is whole, and each version of it has a number. (What PyPI has of this kind,
gcp-storage-emulator, heeds no conditions on these numbers; TensorStore goes by them.)
"""

import contextlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
import gcsfs.core
import pytest
from etils.epath import backend
from fsspec.registry import _registry

PATH = re.compile(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o/?(.*))?")
PART = re.compile(rb"--==0==\nContent-Type: .*?\n\n(.*?)(?=\n--==0==)", re.DOTALL)
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
# What the clients look at; the credentials are nobody's, and are not looked for.
ENVIRONMENT = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true"}
ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class Request(NamedTuple):
    """Bytes that went one way or the other: GET, PUT when it is whole, or DELETE."""

    method: str
    name: str
    num_bytes: int = 0


class Buckets(ThreadingHTTPServer):
    """A server on loopback: one a process, since TensorStore looks it up only once.

    Attributes:
      objects: the bytes of each, by "BUCKET/NAME".
      uploads: those that were begun in parts, finished or not.
      log: what was done to objects, in order.
      refuses: whether a request of this method of HTTP is forbidden.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.numbers = itertools.count(1_700_000_000_000_000)
        self.clear()

    def clear(self):
        self.objects, self.generations, self.uploads, self.log = {}, {}, {}, []
        self.refuses = lambda method: False

    @contextlib.contextmanager
    def serving(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        yield self
        self.shutdown()
        thread.join()
        self.server_close()

    @contextlib.contextmanager
    def clients(self):
        """Let the block find this server, with clients that know nothing yet."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (
                ENVIRONMENT | dict.fromkeys(ADDRESSES, self.url)
            ).items():
                patch.setenv(name, value)
            _forget_clients()
            # Without what asks Google itself, by gRPC, of which kind a bucket is.
            plain = gcsfs.core.GCSFileSystem
            fsspec.register_implementation("gcs", plain, clobber=True)
            yield self
            _forget_clients()

    def put(self, name, content):
        """A new version of an object; returns what is said of it."""
        self.objects[name], self.generations[name] = content, next(self.numbers)
        self.log.append(Request("PUT", name, len(content)))
        return self.describe(name)

    def describe(self, name):
        bucket, _, key = name.partition("/")
        number, size = self.generations[name], str(len(self.objects[name]))
        about = {"bucket": bucket, "name": key, "size": size}
        seconds = f"{number // 60 % 60:02}:{number % 60:02}.000000Z"
        time = f"2023-07-18T00:{seconds}"
        return about | {"generation": str(number), "updated": time}

    def names(self, prefix):
        """What follows "BUCKET/..." in the names that begin so."""
        return sorted(n[len(prefix) :] for n in self.objects if n.startswith(prefix))


def _forget_clients():
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcsfs.core.GCSFileSystem.clear_instance_cache()
    _registry.pop("gcs", None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16

    def log_message(self, format, *args):
        pass  # nothing on the terminal

    def _answer(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        kind, bucket, key = PATH.fullmatch(url.path).groups()
        with self.server.lock:
            if self.server.refuses(self.command):
                self._send(403)
            elif kind == "/upload":
                self._upload(bucket, url.path, body)
            elif key:
                self._object(f"{bucket}/{unquote(key)}")
            else:
                self._send(200, {"name": bucket} if key is None else self._list(bucket))

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _object(self, name):
        content, number = (
            self.server.objects.get(name),
            self.server.generations.get(name),
        )
        if content is None:
            self._send(404)
        elif self.query.get("ifGenerationMatch", str(number)) != str(number):
            self._send(412)
        elif self.query.get("ifGenerationNotMatch") == str(number):
            self._send(304)
        elif self.command == "DELETE":
            del self.server.objects[name], self.server.generations[name]
            self.server.log.append(Request("DELETE", name))
            self._send(204)
        elif self.query.get("alt") != "media":
            self._send(200, self.server.describe(name))
        else:
            headers, size = {"X-Goog-Generation": str(number)}, len(content)
            if asked := RANGE.fullmatch(self.headers["Range"] or ""):
                start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                content = content[start:stop]
            self.server.log.append(Request("GET", name, len(content)))
            self._send(206 if asked else 200, content, headers)

    def _list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, last = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], {}
        for rest in self.server.names(f"{bucket}/{prefix}"):
            if prefix + rest < first or (last and prefix + rest >= last):
                continue
            if delimiter and delimiter in rest:
                prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                items.append(self.server.describe(f"{bucket}/{prefix}{rest}"))
        return {"items": items, "prefixes": list(prefixes)}

    def _upload(self, bucket, path, body):
        uploads, number = self.server.uploads, self.query.get("upload_id")
        match self.query.get("uploadType"):
            case "media":
                self._put(f"{bucket}/{self.query['name']}", body)
            case "multipart":
                about, content = PART.findall(body)
                self._put(f"{bucket}/{json.loads(about)['name']}", content)
            case "resumable":
                number = str(len(uploads))
                uploads[number] = f"{bucket}/{self.query['name']}", bytearray()
                location = f"{self.server.url}{path}?upload_id={number}"
                self._send(200, {}, {"Location": location})
            case None:
                name, content = uploads[number]
                content += body
                if self.headers["Content-Range"].endswith("/*"):
                    self._send(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
                else:
                    self._put(name, bytes(content))

    def _put(self, name, content):
        number = str(self.server.generations.get(name, 0))
        if self.query.get("ifGenerationMatch", number) != number:
            self._send(412)
        else:
            self._send(200, self.server.put(name, content))

    def _send(self, status, body=b"", headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
