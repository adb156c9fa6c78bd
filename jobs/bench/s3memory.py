"""An object store in memory that speaks as much S3 as s3fs does: what a simulated S3 keeps its objects in.

SeaweedFS writes some 80 MB/s on two cores, less than one connection of the S3 that is simulated. This one costs little
more than the copying of bytes. It checks no signatures, and its ETags are numbers, not MD5 sums.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.sax.saxutils import escape

from jobs.bench.s3wire import Head

_MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"
_PAGE = 1000


@dataclass
class Blob:
    """An object: the parts it was uploaded in, never joined."""

    parts: list[bytearray]
    etag: str
    starts: list[int] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(map(len, self.parts))]
        self.size = self.starts.pop()

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes `[start, end)`."""
        at = max(0, bisect_right(self.starts, start) - 1)
        for part, begins in zip(self.parts[at:], self.starts[at:]):
            if begins >= end:
                return
            yield memoryview(part)[max(0, start - begins) : end - begins]


@dataclass
class Answer:
    """What a request is answered with: a short text, or a range of an object."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    blob: Blob | None = None
    start: int = 0
    end: int = 0

    def head(self, *, bodiless: bool) -> bytes:
        """The answer's first lines; a HEAD request is told the length of what it does not get."""
        length = self.end - self.start if self.blob else len(self.text.encode())
        lines = {"Content-Length": str(length), "x-amz-request-id": "0", **self.headers}
        if self.text and not bodiless:
            lines["Content-Type"] = "application/xml"
        return (f"HTTP/1.1 {self.status} -\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


def error(status: int, code: str, message: str = "") -> Answer:
    """An S3 error."""
    return Answer(status, text=f"<Error><Code>{code}</Code><Message>{escape(message or code)}</Message></Error>")


def _result(of: str, inside: str) -> Answer:
    return Answer(200, text=f"<{of}Result>{inside}</{of}Result>")


class MemoryStore:
    """Buckets, objects and unfinished multipart uploads."""

    def __init__(self) -> None:
        self._buckets: dict[str, dict[str, Blob]] = {}
        self._uploads: dict[str, tuple[str, str, dict[int, Blob]]] = {}
        self._numbers = itertools.count(1)

    def _blob(self, parts: list[bytearray]) -> Blob:
        return Blob(parts, f'"{next(self._numbers):032x}"')

    def answer(self, request: Head, body: bytearray) -> Answer:
        """Do what a request asks."""
        bucket, _, key = request.path.lstrip("/").partition("/")
        if not bucket:
            names = "".join(f"<Bucket><Name>{b}</Name></Bucket>" for b in self._buckets)
            return _result("ListAllMyBuckets", f"<Buckets>{names}</Buckets>")
        if bucket not in self._buckets and not (request.method == "PUT" and not key):
            return error(404, "NoSuchBucket", bucket)
        if not key:
            return self._bucket(request, bucket, body)
        return self._object(request, bucket, key, body)

    def _bucket(self, request: Head, bucket: str, body: bytearray) -> Answer:
        query = request.query
        if request.method == "PUT":
            self._buckets.setdefault(bucket, {})
            return Answer(200)
        if request.method == "DELETE":
            del self._buckets[bucket]
            return Answer(204)
        if request.method == "POST" and "delete" in query:
            gone = re.findall(r"<Key>(.*?)</Key>", body.decode(), re.DOTALL)
            for key in gone:
                self._buckets[bucket].pop(_unescape(key), None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in gone)
            return _result("Delete", deleted)
        if request.method == "GET" and "uploads" in query:
            return _result("ListMultipartUploads", self._unfinished(bucket))
        if request.method == "GET" and "versioning" in query:
            return Answer(200, text="<VersioningConfiguration/>")
        if request.method == "GET" and "list-type" in query:
            return self._list(bucket, query)
        return Answer(200) if request.method == "HEAD" else error(501, "NotImplemented", request.raw.decode())

    def _unfinished(self, bucket: str) -> str:
        return "".join(
            f"<Upload><Key>{escape(key)}</Key><UploadId>{number}</UploadId></Upload>"
            for number, (b, key, _) in self._uploads.items()
            if b == bucket
        )

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        most = int(query.get("max-keys", _PAGE))
        entries: dict[str, str] = {}
        for key in sorted(self._buckets[bucket]):
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    folder = prefix + rest.split(delimiter)[0] + delimiter
                    entries[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
                else:
                    blob = self._buckets[bucket][key]
                    entries[key] = (
                        f"<Contents><Key>{escape(key)}</Key><Size>{blob.size}</Size><ETag>{escape(blob.etag)}</ETag>"
                        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    )
        names = [name for name in entries if name > after]
        page, more = names[:most], len(names) > most
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        found = "".join(entries[name] for name in page)
        counts = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
        return _result("ListBucket", counts + token + found)

    def _object(self, request: Head, bucket: str, key: str, body: bytearray) -> Answer:
        objects, query, headers = self._buckets[bucket], request.query, request.headers
        if request.method in ("GET", "HEAD"):
            return _get(objects.get(key), key, headers.get("range"))
        if request.method == "DELETE":
            if "uploadId" in query:
                self._uploads.pop(query["uploadId"], None)
            else:
                objects.pop(key, None)
            return Answer(204)
        if request.method == "POST" and "uploads" in query:
            number = f"{next(self._numbers):08x}"
            self._uploads[number] = (bucket, key, {})
            return _result("InitiateMultipartUpload", f"<UploadId>{number}</UploadId>")
        if request.method == "PUT" and "uploadId" in query:
            if query["uploadId"] not in self._uploads:
                return error(404, "NoSuchUpload", query["uploadId"])
            part = self._blob([body])
            self._uploads[query["uploadId"]][2][int(query["partNumber"])] = part
            return Answer(200, {"ETag": part.etag})
        if request.method in ("PUT", "POST"):
            return self._write(request, bucket, key, body)
        return error(501, "NotImplemented", request.raw.decode())

    def _write(self, request: Head, bucket: str, key: str, body: bytearray) -> Answer:
        """A PUT, a copy, or the end of a multipart upload: whatever makes an object appear."""
        objects, source = self._buckets[bucket], request.headers.get("x-amz-copy-source")
        if request.headers.get("if-none-match") == "*" and key in objects:
            return error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        if request.method == "POST":
            upload = self._uploads.pop(request.query["uploadId"], None)
            if upload is None:
                return error(404, "NoSuchUpload", request.query["uploadId"])
            objects[key] = self._blob([part.parts[0] for _, part in sorted(upload[2].items())])
            etag = escape(objects[key].etag)
            return _result("CompleteMultipartUpload", f"<ETag>{etag}</ETag>")
        if source:
            from_bucket, _, from_key = unquote(source).lstrip("/").partition("/")
            found = self._buckets.get(from_bucket, {}).get(from_key)
            if found is None:
                return error(404, "NoSuchKey", source)
            objects[key] = self._blob(found.parts)
            etag = escape(objects[key].etag)
            return _result("CopyObject", f"<ETag>{etag}</ETag>")
        objects[key] = self._blob([body])
        return Answer(200, {"ETag": objects[key].etag})


def _get(blob: Blob | None, key: str, wanted: str | None) -> Answer:
    if blob is None:
        return error(404, "NoSuchKey", key)
    headers = {"ETag": blob.etag, "Last-Modified": _MODIFIED, "Accept-Ranges": "bytes"}
    if wanted is None:
        return Answer(200, headers, blob=blob, start=0, end=blob.size)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if not first:
        start, end = max(0, blob.size - int(last)), blob.size
    else:
        start, end = int(first), min(blob.size, int(last) + 1 if last else blob.size)
    if start >= end:
        return error(416, "InvalidRange", wanted)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
    return Answer(206, headers, blob=blob, start=start, end=end)


def _unescape(text: str) -> str:
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(name, character)
    return text
