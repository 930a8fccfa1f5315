"""Downloads: whole or not at all."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from utils.errors import InputError
from utils.files import atomic_write, human_size, reason

TIMEOUT = 30.0  # seconds without a byte
TRIES = 3


def fetch(address: str, path: Path, timeout: float = TIMEOUT, pause: float = 2.0) -> Path:
    """Downloads `address` to `path`, with a progress bar; a file that stands there is always a whole one.

    The length that the server announces is checked; a connection that breaks off is tried again from the start.

    Raises:
        InputError: with the address, what went wrong, and where to put the file by hand.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"{address} is not an http address")
    wrong = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(pause * attempt)
        try:
            with atomic_write(path) as temporary:
                _fetch_once(address, temporary, timeout)
            return path
        except urllib.error.HTTPError as error:
            wrong = f"the server says {error.code} {reason(Exception(error.reason))}"
            if error.code < 500 and error.code not in (408, 429):
                break  # not found, not allowed: it will not change its mind
        except urllib.error.URLError as error:
            wrong = f"no connection: {reason(error.reason) if isinstance(error.reason, OSError) else error.reason}"
        except (OSError, http.client.HTTPException) as error:
            wrong = reason(error) or type(error).__name__
    raise InputError(f"{address} could not be downloaded ({wrong}); put the file at {path}")


def _fetch_once(address: str, path: Path, timeout: float) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "expo", "Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=timeout) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=address.rsplit("/", 1)[-1], disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        size = file.tell()
    if total is not None and size != total:
        raise OSError(f"{human_size(size)} came of {human_size(total)}")
    if size == 0:
        raise OSError("the server sent nothing")
