"""The files of all attempts in an object store: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure.

Trainer processes write plain files into a folder of this machine, and `keep` copies them. An object appears complete or
not at all, under a key that no other attempt has. Nobody reads it before a row of the database names it, but for a
checkpoint, which a next attempt also looks for if its worker was killed before it could name it. Objects never
change once they are named, but for checkpoints; so what `fetch` has copied to this machine is read from here.
"""

import contextlib
import io
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from storage import artifacts
from storage.artifact_store import OURS, ArtifactStore, ObjectFile, Stored, local_files
from storage.errors import ObjectStoreAway, ObjectStoreError, SettingsError

if TYPE_CHECKING:  # an optional package, imported where it is used
    import tenacity
    from obstore.store import ClientConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

AT_ONCE = 16  # downloads of small files
MOST_LISTINGS = 8  # of trials; for more the whole study is listed
# For one request. A large file takes several, of 5 MB each on its way up. READ_TIMEOUT includes the time in which a
# part is sent: with the client's 12 parts at once, a network of less than 1 MB/s could upload no large file.
CONNECT_TIMEOUT, READ_TIMEOUT, TIMEOUT = timedelta(seconds=5), timedelta(seconds=60), timedelta(hours=1)
PARTS_AT_ONCE = 2  # of one file
RETRIES, RETRY_SECONDS = 3, 10  # of the client, which knows what is worth a try; who waits longer asks again
# S3 answers these mistakes with 400, as it does some of what passes (RequestTimeout), or redirects to another region.
MISTAKES = re.compile(
    "<Code>(ExpiredToken|InvalidToken|TokenRefreshRequired|InvalidBucketName|AuthorizationHeaderMalformed"
    "|IllegalLocationConstraintException)</Code>|incorrectly configured region"
)
NO_CREDENTIALS = "169.254.169.254"  # the client asks this address of a cloud's machines when it has found none


class ObjectStore(ArtifactStore):
    """Objects below the prefix `url`, with copies on this machine below `folder`."""

    is_far = True

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder

    # --- what every store does ----------------------------------------------------------------------------

    def check(self, patience: float = 0.0) -> None:
        probe, content = f".trialyard-{uuid.uuid4().hex}", b"May this machine write, read and remove objects?"

        def once() -> None:
            self._put(probe, content)
            try:
                stored = io.BytesIO()
                self._read(PurePosixPath(probe), stored.write)
                if stored.getvalue() != content:
                    raise ObjectStoreError(f"{self.url} does not give back what is written to it: use another store")
            finally:  # nobody would find it later
                with self._understood(), contextlib.suppress(FileNotFoundError):
                    self._client.delete(probe)
            self._require_listing(f"{probe}-missing")

        self.with_patience(once, patience)

    def _require_listing(self, missing: str) -> None:
        """Raises ObjectStoreError if an object that does not exist is refused: a resume looks for such checkpoints."""
        try:
            self._read(PurePosixPath(missing), len)
        except ObjectStoreAway:
            raise
        except ObjectStoreError as error:
            raise ObjectStoreError(
                f"{self.url} does not tell this machine which objects are missing: give its credentials the right to "
                "list the bucket (s3:ListBucket), too"
            ) from error

    def name(self, path: PurePosixPath | str) -> str:
        return f"{self.url}/{path}".rstrip("/")

    def fetch(self, path: object) -> Path | None:
        found = artifacts.inside(self.folder, path)
        if found is None or found.is_file():
            return found
        return found if self.download(PurePosixPath(str(path)), found) else None

    def fetch_all(self, paths: Collection[object]) -> None:
        missing = [path for path in dict.fromkeys(paths) if path is not None]
        missing = [path for path in missing if (to := artifacts.inside(self.folder, path)) and not to.is_file()]
        if missing:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self.fetch, missing))

    def open(self, path: PurePosixPath) -> BinaryIO | None:
        # Not as it arrives: a reader would take a connection that is cut for the end of the file.
        file = TemporaryFile()  # noqa: SIM115 - the caller closes it
        try:
            if self._read(path, file.write):
                file.seek(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def existing(self, paths: Collection[PurePosixPath]) -> dict[PurePosixPath, Path | ObjectFile]:
        trials = {PurePosixPath(*path.parts[:2]) for path in paths}
        studies = {PurePosixPath(path.parts[0]) for path in paths}
        listed = {
            stored.path: ObjectFile(url=self.name(stored.path), size=stored.size)
            for prefix in (trials if len(trials) <= MOST_LISTINGS else studies)
            for stored in self._listed(prefix)
        }
        return {path: listed[path] for path in paths if path in listed}

    def files(self) -> Iterator[Stored]:
        # Also what is on this machine alone: what a worker left that was killed, and copies of what is gone.
        found = {stored.path: stored for stored in local_files(self.folder)}
        found |= {stored.path: stored for stored in self._listed(None) if OURS.fullmatch(stored.path.name)}
        return iter([found[path] for path in sorted(found)])

    def still(self, file: Stored) -> Stored | None:
        return file

    def keep(self, path: PurePosixPath) -> None:
        with (self.folder / path).open("rb") as file:
            self._put(str(path), file, max_concurrency=PARTS_AT_ONCE)

    def _put(self, key: str, content: bytes | BinaryIO, **options: Any) -> None:
        try:
            with self._understood():
                self._client.put(key, content, **options)
        except FileNotFoundError as error:
            # Such as an upload in parts whose end was asked for twice, because the first answer was lost.
            raise ObjectStoreAway(
                f"{self.name(key)} cannot be written, because the server does not know this address or upload "
                f"({_cause(error)}): correct TRIALYARD_ARTIFACTS or the store's address, or run the command again"
            ) from error

    def remove(self, paths: Collection[PurePosixPath]) -> None:
        if not paths:
            return
        keys = sorted(map(str, paths))
        with self._understood():
            try:
                self._client.delete(keys)
            except FileNotFoundError:  # S3 does not mind; other stores name the first that is missing, and stop
                for key in keys:
                    with contextlib.suppress(FileNotFoundError):
                        self._client.delete(key)
        self.remove_local(paths)

    # --- objects ------------------------------------------------------------------------------------------

    def download(self, path: PurePosixPath, to: Path) -> bool:
        """Copies the object to the file `to`, complete or not at all. False if it does not exist."""
        try:
            with artifacts.stored(to) as temporary, temporary.open("wb") as file:
                if not self._read(path, file.write):
                    raise _Missing
        except _Missing:
            return False
        return True

    def with_patience(self, call: Callable[[], T], seconds: float, stop: threading.Event | None = None) -> T:
        """What `call` gives, tried again for `seconds` while the store is away, or until `stop` is set.

        Raises ObjectStoreAway, or at once what says that it is refused.
        """
        if seconds <= 0:
            return call()
        import tenacity

        stopping = stop or threading.Event()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ObjectStoreAway),
            # The jitter keeps a hundred workers from knocking all at once when the store is back.
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=5.0),
            stop=tenacity.stop_any(tenacity.stop_after_delay(seconds), tenacity.stop_when_event_set(stopping)),
            sleep=tenacity.sleep_using_event(stopping),
            before_sleep=_log_first_failure,
            reraise=True,
        )
        return retrying(call)

    def _read(self, path: PurePosixPath, write: Callable[[bytes], Any]) -> bool:
        """Gives `write` the object's bytes, piece by piece; False if it does not exist."""
        with self._understood():
            try:
                result = self._client.get(str(path))
            except FileNotFoundError:
                return False
            size = 0
            for piece in result:
                size += write(bytes(piece))
            if size != result.meta["size"]:
                raise ObjectStoreAway(f"{self.name(path)} was cut off after {size:,} bytes: run the command again")
        return True

    def _listed(self, prefix: PurePosixPath | None) -> Iterator[Stored]:
        with self._understood():
            for page in self._client.list(None if prefix is None else str(prefix), chunk_size=1000):
                for entry in page:
                    yield Stored(
                        path=PurePosixPath(entry["path"]),
                        size=entry["size"],
                        modified=entry["last_modified"].timestamp(),
                    )

    @cached_property
    def _client(self) -> Any:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise SettingsError(
                f"TRIALYARD_ARTIFACTS = {self.url!r} needs the package obstore, which is not installed: "
                "`pip install '.[s3]'` in Trialyard's folder, or name a folder"
            ) from None
        options: ClientConfig = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "timeout": TIMEOUT}
        if _endpoint().startswith("http://"):
            options["allow_http"] = True  # a server of one's own, whose address says so
        try:
            return from_url(
                self.url,
                client_options=options,
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            )
        except (BaseError, ValueError) as error:
            raise SettingsError(
                f"TRIALYARD_ARTIFACTS = {self.url!r} cannot be used ({_cause(error)}): correct it, or the variables of "
                "the object store that docs/settings.md names"
            ) from None

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """Turns the client's errors into ours. FileNotFoundError passes, unless the whole bucket is missing."""
        self._client  # noqa: B018 - its own errors come first, and it imports the package
        from obstore import exceptions

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" not in str(error) and "ContainerNotFound" not in str(error):
                raise
            raise ObjectStoreError(
                f"the bucket of {self.url} does not exist: create it, or correct TRIALYARD_ARTIFACTS"
            ) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise ObjectStoreError(
                f"{self.url} refuses this machine ({_cause(error)}): give its credentials the right to write, read, "
                "list and remove objects, or correct them"
            ) from error
        except exceptions.BaseError as error:
            if NO_CREDENTIALS in str(error):
                raise ObjectStoreError(
                    f"there are no credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                    "those of your store"
                ) from error
            if MISTAKES.search(str(error)) is not None:
                raise ObjectStoreError(
                    f"{self.url} cannot be used with these settings ({_cause(error)}): correct the credentials, the "
                    "region (AWS_REGION) or TRIALYARD_ARTIFACTS"
                ) from error
            raise ObjectStoreAway(
                f"{self.url} cannot be reached ({_cause(error)}): bring it back, or correct TRIALYARD_ARTIFACTS or "
                "the store's address"
            ) from error


class _Missing(Exception):  # noqa: N818 - it is an event
    """The object does not exist."""


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _cause(error: BaseException) -> str:
    """The client's own words on one line: its errors have a line for each of their causes."""
    return " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__


def _log_first_failure(state: "tenacity.RetryCallState") -> None:
    error = state.outcome.exception() if state.outcome else None
    if state.attempt_number == 1:
        log.warning("the object store cannot be reached, trying again: %s", error)
