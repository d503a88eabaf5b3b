"""HTTP requests to strangers: within limits on time, bytes, redirects and addresses, whatever they answer."""

import asyncio
import urllib.request
from contextlib import asynccontextmanager
from urllib.parse import urljoin

import aiohttp
import httpx

from custom_diffusion.retrieval.addresses import PRIVATE, Resolver, host_and_port, is_public, literal_address
from custom_diffusion.retrieval.class_image import Rejected

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
IDLE_SECONDS = (
    1  # that a connection is kept for the host's next image; thousands of hosts must not use up the open files
)
USER_AGENT = "custom-diffusion-retrieve/0.1 (fetches captioned images for training; one pass, no crawling)"


class NoAnswer(Rejected):
    """A host did not answer, or not to the end; it may on another day."""

    def __init__(self, reason: str):
        super().__init__(reason, lasting=False)


class Client:
    """Asks for one address at a time or for many, all with the same limits.

    Args:
        seconds: of wall clock for a whole request, its name look-up and redirects included.
        allow_private: whether addresses on private networks may be reached. Where they may not, names are checked after they
            are looked up, and at every redirect, and the connection goes to the very address that was checked.
    """

    def __init__(self, seconds: float, allow_private: bool):
        self.seconds = seconds
        self.allow_private = allow_private
        self._proxies = urllib.request.getproxies()
        self._tls = httpx.create_ssl_context()  # the certificates that the Hub is asked with, SSL_CERT_FILE included
        self._resolvers = {public_only: Resolver(seconds, public_only) for public_only in (True, False)}
        # Two sessions: a connection that one request may use is not lent to one that may not.
        self._sessions = {public_only: self._session(public_only) for public_only in (True, False)}

    def _session(self, public_only):
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=self._resolvers[public_only],
            use_dns_cache=False,
            ssl=self._tls,
            keepalive_timeout=IDLE_SECONDS,
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # 3 kB can be inflated to gigabytes
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        for public_only in (True, False):
            await self._sessions[public_only].close()
            await self._resolvers[public_only].close()

    async def look_up(self, url: str, may_be_private: bool):
        """Find the addresses of a host, so that a request to it need not wait for that. Raises Rejected."""
        host, _ = host_and_port(url)
        if self._proxy_for(url, host) is None:
            await self._resolvers[not (self.allow_private or may_be_private)].addresses(host)

    async def request(
        self, method: str, url: str, max_bytes: int, may_be_private: bool, accept: str, json: dict | None = None
    ) -> tuple[int, bytes]:
        """Status and body of an answer, redirects followed.

        Args:
            method: GET or POST.
            url: absolute.
            max_bytes: of the body.
            may_be_private: whether this address was named by the user, and may be on a private network though
                `allow_private` is not set; so may what an address there redirects to.
            accept: value of that header.
            json: to be posted.
        Raises:
            Rejected: no answer within the limits; the reason is one to count by, its cause has details.
        """
        try:
            # Around everything: a server may drip its headers, its body, or a chain of redirects.
            return await asyncio.wait_for(
                self._follow(method, url, max_bytes, may_be_private, accept, json), self.seconds
            )
        except asyncio.TimeoutError as error:
            raise NoAnswer("too slow") from error
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise Rejected("not an http(s) address") from error
        except Rejected:
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswer("connection failed") from error
        except Exception as error:  # a parser that a stranger's answer broke costs this address only
            raise NoAnswer("broken answer") from error

    async def _follow(self, method, url, max_bytes, may_be_private, accept, json):
        for _ in range(MAX_REDIRECTS + 1):
            async with self._open(method, url, may_be_private, accept, json) as response:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or not location:
                    return response.status, await _read(response, max_bytes)
                if response.status not in (307, 308):
                    method, json = "GET", None
                came_from = response.url
            may_be_private = may_be_private and await self.is_private(str(came_from))
            url = urljoin(str(came_from), location)
        raise Rejected("too many redirects")

    @asynccontextmanager
    async def _open(self, method, url, may_be_private, accept, json):
        host, _ = host_and_port(url)
        public_only = not (self.allow_private or may_be_private)
        proxy = self._proxy_for(url, host)
        if proxy is not None:
            await self._check_for_proxy(host, public_only)
            public_only = False  # the proxy itself is on a private network
        elif literal_address(host) is not None:  # aiohttp does not ask the resolver
            await self._resolvers[public_only].addresses(host)
        session = self._sessions[public_only]
        async with session.request(
            method, url, json=json, proxy=proxy, allow_redirects=False, headers={"Accept": accept}
        ) as response:
            yield response

    async def _check_for_proxy(self, host, public_only):
        """Refuse a private address behind a proxy, as far as it can be told from here: the proxy looks names up itself."""
        try:
            await self._resolvers[public_only].addresses(host)
        except Rejected as rejected:
            if str(rejected) == PRIVATE:
                raise

    def _proxy_for(self, url, host):
        """The proxy that the environment names for an address, or None."""
        proxy = self._proxies.get(url.partition(":")[0].lower()) or self._proxies.get("all")
        return None if not proxy or not proxy.startswith("http") or urllib.request.proxy_bypass(host) else proxy

    async def is_private(self, url: str) -> bool:
        """Whether an address leads to a private network only."""
        try:
            addresses = await self._resolvers[False].addresses(host_and_port(url)[0])
        except Rejected:
            return False
        return not any(is_public(address) for _, address in addresses)


async def _read(response, max_bytes):
    """The body as sent, bounded."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise Rejected("compressed answer that was not asked for")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise Rejected("more bytes than allowed")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise Rejected("more bytes than allowed")
    return bytes(body)
