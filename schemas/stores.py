"""The file systems behind URLs: how they are opened, tried again, and told of in one line when they fail."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa

from schemas.errors import StoreError, UserError

T = TypeVar("T")

OPTIONS = ("endpoint_override", "region", "scheme")
"""What a URL's query may say of S3 or GCS."""
ATTEMPTS = 4
"""How often a read or a write is tried, where the store has answered before; pyarrow tries each request 3 times."""
FIRST_WAIT_S = 0.5
"""Seconds before the second attempt; each wait is twice as long as the one before."""
CONNECT_S = 3.0
"""Seconds that a connection may take."""

_LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidAccessKeyId"
    r"|HTTP status 40[0134]|PERMISSION_DENIED|Permission denied|UNAUTHENTICATED|OAuth2"
)
"""What a store says that it would say again."""
_UNREACHABLE = re.compile(r"NETWORK_CONNECTION|curlCode: (?:6|7|28|35|56|60)\b|Could not create|retry policy exhausted")


class Place(NamedTuple):
    """Which file system a URL means, and where in it."""

    scheme: str
    host: str
    """The bucket, or the host and port."""
    query: str
    """Options, as they stand in the URL."""
    inside: PurePosixPath
    """Path below the bucket or host, absolute."""

    @property
    def url(self) -> str:
        """The URL without its options."""
        return f"{self.scheme}://{self.host}{self.inside if self.inside.name else '/'}"

    @property
    def store(self) -> "Store":
        """The file system; errors are those of `Store.of`."""
        return Store.of(self.scheme, self.host, self.query)

    @property
    def key(self) -> str:
        """The path as its file system writes it."""
        return f"{self.host}{self.inside}".rstrip("/") if self.store.keys_have_host else str(self.inside)

    def ask(self, work: Callable[["Store", str], T]) -> T:
        """Return what ``work`` makes of the store and the key, tried again where it fails for a reason that may pass.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the store cannot be reached, refuses, or fails again and again.
        """
        store, key = self.store, self.key
        wait_s = FIRST_WAIT_S
        for attempt in range(ATTEMPTS):
            try:
                done = work(store, key)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
            except (OSError, pa.ArrowException) as error:
                # One that has never answered is told of at once: its name may be wrong.
                if _LASTING.search(str(error)) or not store.answered or attempt == ATTEMPTS - 1:
                    raise StoreError(f"{self.url}: {_reason(self.scheme, error)}") from None
            else:
                if not store.answered:
                    store.answered.append(True)
                return done
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within the block, errors of the store are `StoreError`."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.url}: {_reason(self.scheme, error)}") from None

    def bucket_is_there(self) -> bool:
        """Whether the bucket is; also true where this may not be asked, or there are no buckets."""
        return _bucket_is_there(self.scheme, self.host, self.query, _surroundings())


class Store(NamedTuple):
    """A file system of pyarrow."""

    files: Any
    keys_have_host: bool
    """Its paths begin with the bucket."""
    makes_folders: bool
    """Folders must be made before files are written into them."""
    answered: list[bool]
    """Whether it ever did."""

    @staticmethod
    def of(scheme: str, host: str, query: str) -> "Store":
        """Open the file system of a URL. One a process: its connections and threads do not outlive a fork.

        Raises:
            UserError: it is not known, or needs what is not installed.
        """
        return _opened(scheme, host, query, _surroundings())

    def writer(self, key: str) -> Any:
        """A stream to write a file in order; it is there when the stream is closed."""
        if self.makes_folders:
            self.files.create_dir(key.rpartition("/")[0], recursive=True)
        # As it is: pyarrow would compress what is called .gz.
        return self.files.open_output_stream(key, compression=None)

    def check_size(self, key: str, size: int) -> None:
        """Raise an `OSError` where a file that was written is not as long as what was written."""
        there = self.files.get_file_info(key).size
        if there != size:
            raise OSError(errno.EIO, f"{there} bytes of {size} have arrived")


def _surroundings() -> tuple[object, ...]:
    """What decides, beside a URL, which store is meant; a file system is opened anew where it is another."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")
    return (os.getpid(), *(os.environ.get(name) for name in names))


@lru_cache(maxsize=64)
def _opened(scheme: str, host: str, query: str, surroundings: object) -> Store:
    from pyarrow import fs

    options = dict(parse_qsl(query))
    try:
        if scheme == "s3":
            return Store(_s3(options), True, False, [])
        if scheme in ("gs", "gcs"):
            from datetime import timedelta

            endpoint = {} if "endpoint_override" not in options else {"anonymous": True}
            return Store(
                fs.GcsFileSystem(retry_time_limit=timedelta(seconds=5), **endpoint, **options), True, False, []
            )
        if scheme in ("hdfs", "viewfs"):
            user, _, at = host.rpartition("@")
            name, _, port = at.partition(":")
            files = fs.HadoopFileSystem(name or "default", int(port or 0), user=user or None)
            return Store(files, False, True, [])
    except (OSError, pa.ArrowException, ValueError) as error:
        need = (
            ""
            if scheme in ("s3", "gs", "gcs")
            else "; it needs Java and Hadoop's libhdfs: JAVA_HOME, HADOOP_HOME, CLASSPATH"
        )
        raise UserError(f"{scheme}://{host}: cannot be opened ({_first_line(error)}){need}") from None
    import fsspec

    try:
        files = fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(f"{scheme}://{host}: needs a package that is not installed ({_first_line(error)})") from None
    except ValueError:
        raise UserError(
            f"{scheme}://{host}: {scheme} is no file system that is known; s3, gs, hdfs, file and those of fsspec are"
        ) from None
    return Store(fs.PyFileSystem(fs.FSSpecHandler(files)), True, True, [])


@lru_cache(maxsize=64)
def _bucket_is_there(scheme: str, host: str, query: str, surroundings: object) -> bool:
    store = Store.of(scheme, host, query)
    if scheme not in ("s3", "gs", "gcs"):
        return True
    try:
        there: bool = store.files.get_file_info(host).type.name != "NotFound"
        return there
    except (OSError, pa.ArrowException):
        return True


def _s3(options: dict[str, str]) -> Any:
    from pyarrow import fs

    if "endpoint_override" not in options and (
        endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    ):
        parts = urlsplit(endpoint)
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme} | options
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region and "region" not in options:
        options = {"region": region} | options
    elif "endpoint_override" in options and "region" not in options:
        # Another store than Amazon's has none, or takes any.
        options = {"region": "us-east-1"} | options
    if "endpoint_override" in options:
        # Amazon's client sends checksums behind the content, in a form that other stores may refuse (Ceph 16 does).
        # Data sets and checkpoints have checksums of their own.
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            os.environ.setdefault(name, "when_required")
    # A small file is one request then, which is done or not.
    return fs.S3FileSystem(connect_timeout=CONNECT_S, allow_delayed_open=True, **options)


def _reason(scheme: str, error: BaseException) -> str:
    text = str(error)
    told = _first_line(error)
    if "NO_SUCH_BUCKET" in text:
        return "there is no such bucket"
    if _LASTING.search(text):
        keys = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" if scheme == "s3" else "GOOGLE_APPLICATION_CREDENTIALS"
        return f"the store refuses ({told}); are there credentials ({keys}), and may they do this?"
    if _UNREACHABLE.search(text):
        return f"the store cannot be reached ({told}); is its address right (AWS_ENDPOINT_URL), and is it up?"
    return f"failed again and again, the last time with: {told}"


def _first_line(error: BaseException) -> str:
    # pyarrow puts a place and what it was doing before what the store has said.
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(?:\[Errno \d+\] )?When [^:]*'[^']*'[^:]*: ", "", text)
    return text if len(text) <= 200 else f"{text[:200]}..."
