"""Pictures in a bucket of S3, or of whatever speaks its protocol, by fsspec's s3fs.

Credentials, region and endpoint come from where botocore looks for them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL_S3, AWS_PROFILE, the machine's role.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from fsspec.exceptions import FSTimeoutError

from worker.stores import StoreRefusal, StoreTrouble

_CONFIG = {  # s; and one attempt more, since whoever calls has a patience of its own
    "connect_timeout": 3,
    "read_timeout": 10,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "max_pool_connections": 64,
}
_REFUSALS = (PermissionError, FileNotFoundError, NoCredentialsError, PartialCredentialsError, ProfileNotFound)


class S3Store:
    """An ImageStore. The bucket must be there."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._root = bucket, f"{bucket}/{prefix}".rstrip("/")
        self.address = f"s3://{self._root}"
        self._files: Any = s3fs.S3FileSystem(config_kwargs=_CONFIG, use_listings_cache=False, skip_instance_cache=True)
        self._files.retries = 1  # botocore's are enough

    def prepare(self) -> None:
        """A bucket has an owner, a region, rules: it is not made in passing."""

    def put(self, name: str, data: bytes) -> None:
        with self._told():
            self._files.pipe_file(f"{self._root}/{name}", data)

    def put_new(self, name: str, data: bytes) -> None:
        with self._told(), suppress(FileExistsError):
            self._files.pipe_file(f"{self._root}/{name}", data, mode="create")

    def get(self, name: str) -> bytes | None:
        with self._told():
            try:
                data: bytes = self._files.cat_file(f"{self._root}/{name}", max_concurrency=1)  # else it would ask for the size first
                return data
            except FileNotFoundError:
                self._files.call_s3("head_bucket", Bucket=self._bucket)  # a bucket that is gone is another answer
                return None

    def remove(self, folder: str) -> None:
        with self._told():
            if not (found := self._find(folder)):
                return
            self._files.rm(list(found))
            if left := self._find(folder):  # s3fs leaves out of its answer what S3 did not delete
                raise StoreRefusal(f"{self.address}: {len(left)} files in {folder} could not be deleted")

    def folders(self, parent: str = "") -> Iterator[str]:
        with self._told():
            try:
                entries = self._files.ls(f"{self._root}/{parent}".rstrip("/"), detail=True)
            except FileNotFoundError:
                entries = []
        yield from sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def newest(self, folder: str) -> float:
        with self._told():
            return max((entry["LastModified"].timestamp() for entry in self._find(folder).values()), default=0.0)

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self._files.find(f"{self._root}/{folder}", detail=True)
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, BotoCoreError, ClientError, FSTimeoutError) as error:
            raise (StoreRefusal if isinstance(error, _REFUSALS) else StoreTrouble)(f"{self.address}: {error}") from error
