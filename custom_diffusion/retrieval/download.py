"""Fetch one picture over HTTP, within limits on time, bytes and redirects."""

import asyncio
import ssl
from collections import defaultdict
from urllib.parse import urlsplit

import httpx

from custom_diffusion.retrieval.pictures import Rejected

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
MAX_PER_HOST = 6  # as browsers do
USER_AGENT = "custom-diffusion-retrieve/0.1 (fetches captioned pictures for training; one pass, no crawling)"


class Downloader:
    """Concurrent downloads, at most `MAX_PER_HOST` of them from one host.

    Args:
        timeout: seconds of wall clock for one picture, from its connection to its last byte.
        num_workers: downloads at a time, all hosts together.
    """

    def __init__(self, timeout: float, num_workers: int):
        self.timeout = timeout
        self._slots = defaultdict(lambda: asyncio.Semaphore(MAX_PER_HOST))
        self._client = httpx.AsyncClient(
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=timeout,
            limits=httpx.Limits(max_connections=num_workers),
            headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        await self._client.aclose()

    async def fetch(self, url: str) -> bytes:
        """The body of a picture's address.

        Raises:
            Rejected: not there, too slow, too large, not http(s); the reason is one to count by.
        """
        async with self._slots[urlsplit(url).netloc]:
            try:
                # Around everything: a server may drip its headers, its body, or a chain of redirects.
                return await asyncio.wait_for(self._get(url), self.timeout)
            except (asyncio.TimeoutError, httpx.TimeoutException):
                raise Rejected("too slow", lasting=False) from None
            except httpx.TooManyRedirects:
                raise Rejected("too many redirects") from None
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError):
                raise Rejected("not an http(s) address") from None
            except (httpx.HTTPError, ssl.SSLError, OSError):
                raise Rejected("connection failed", lasting=False) from None

    async def _get(self, url):
        async with self._client.stream("GET", url) as response:
            status = response.status_code
            if status != 200:
                raise Rejected(f"HTTP {status}", lasting=status < 500 and status not in (408, 425, 429))
            length = response.headers.get("Content-Length", "")
            if length.isdigit() and int(length) > MAX_BYTES:
                raise Rejected("more bytes than allowed")
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise Rejected("more bytes than allowed")
            return bytes(body)
