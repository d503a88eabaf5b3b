"""Fetch one image over HTTP."""

from custom_diffusion.retrieval.class_image import Rejected
from custom_diffusion.retrieval.client import Client

MAX_BYTES = 20_000_000
ACCEPT = "image/*,*/*;q=0.5"
TRY_AGAIN = (408, 425, 429)


class Downloader:
    """Concurrent downloads.

    Args:
        timeout: seconds of wall clock for one image, from its name look-up to its last byte.
        allow_private: whether any address may be on a private network.
        rows_may_be_private: whether addresses given to `fetch` may; what a public one redirects to then still may not.
    """

    def __init__(self, timeout: float, allow_private: bool, rows_may_be_private: bool):
        self._may_be_private = rows_may_be_private
        self._client = Client(timeout, allow_private)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        await self._client.__aexit__(*exception)

    async def look_up(self, url: str):
        """Find the addresses of a host before it is asked for images. Raises Rejected."""
        await self._client.look_up(url, self._may_be_private)

    async def fetch(self, url: str) -> bytes:
        """The body of an image's address.

        Raises:
            Rejected: not there, too slow, too large, not http(s) or not to be reached; the reason is one to count by.
        """
        status, body = await self._client.request("GET", url, MAX_BYTES, self._may_be_private, ACCEPT)
        if status != 200:
            raise Rejected(f"HTTP {status}", lasting=status < 500 and status not in TRY_AGAIN)
        return body
