"""Which addresses may be reached, and name look-ups that nothing waits for."""

import asyncio
import contextlib
import ipaddress
import socket
import threading

from aiohttp.abc import AbstractResolver
from yarl import URL

from custom_diffusion.retrieval.class_image import Rejected

MAX_LOOKUPS = 128  # at a time; a look-up only waits, in a thread of its own
PRIVATE = "address on a private network (reached with --allow_private)"


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not this machine, a private network, a cloud's metadata service."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if mapped is None and ip in _NAT64:
        mapped = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    if mapped is not None:  # IPv6 that leads to an IPv4 address
        return is_public(str(mapped))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def host_and_port(url: str) -> tuple[str, int]:
    """The host of an absolute http(s) address, as it is looked up, and its port.

    Raises:
        Rejected: it is no such address, or its port is no port.
    """
    try:
        parsed = URL(url)
        host, port = parsed.raw_host, parsed.port
    except (ValueError, UnicodeError):
        raise Rejected("not an http(s) address") from None
    # Digits and dots that are no address (127.1, 0127.0.0.1) are one all the same for the operating system.
    odd = bool(host) and set(host) <= set("0123456789.") and literal_address(host) is None
    if parsed.scheme not in ("http", "https") or not host or odd or not port or not 0 < port < 65536:
        raise Rejected("not an http(s) address")
    return host, port


def literal_address(host: str) -> str | None:
    """The host itself when it is an IP address, which nobody looks up."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return host


class Resolver(AbstractResolver):
    """Looks host names up, each once, in threads that neither the end of the program nor Ctrl-C waits for.

    asyncio's own look-ups share a few threads: some names that nobody answers for would hold up all others.

    Args:
        seconds: to wait for one.
        public_only: whether private addresses are left out of the answers. A connection is made to the very address that was
            checked, so that another answer a moment later changes nothing.
    """

    def __init__(self, seconds: float, public_only: bool):
        self.seconds = seconds
        self.public_only = public_only
        self._turns = asyncio.Semaphore(MAX_LOOKUPS)
        self._answers = {}  # host -> task

    async def resolve(self, host, port=0, family=socket.AF_UNSPEC):
        """Addresses as aiohttp wants them. Raises Rejected."""
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": kind,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for kind, address in await self.addresses(host)
        ]

    async def addresses(self, host: str) -> list[tuple[int, str]]:
        """(family, IP address) of a host that may be reached.

        Raises:
            Rejected: there is none, none in time, or none that may be reached.
        """
        if host not in self._answers:
            self._answers[host] = asyncio.ensure_future(self._look_up(host))
        return await asyncio.shield(self._answers[host])

    async def _look_up(self, host):
        if literal_address(host) is not None:
            found = [(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]
        else:
            found = await self._ask_name_servers(host)
        allowed = [(kind, address) for kind, address in found if not self.public_only or is_public(address)]
        if not allowed:
            raise Rejected(PRIVATE, lasting=False)
        return allowed

    async def _ask_name_servers(self, host):
        async with self._turns:
            look_up = _in_thread(socket.getaddrinfo, host, None, 0, socket.SOCK_STREAM)
            try:
                found = await asyncio.wait_for(look_up, self.seconds)
            except (asyncio.TimeoutError, OSError, UnicodeError):
                raise Rejected("host name not found", lasting=False) from None
        return [(kind, address[0]) for kind, _, _, _, address in found]

    async def close(self):
        for task in self._answers.values():
            task.cancel()
        await asyncio.gather(*self._answers.values(), return_exceptions=True)


async def _in_thread(function, *args):
    """What the function returns, from a daemon thread."""
    loop = asyncio.get_running_loop()
    outcome = loop.create_future()

    def settle(method, value):
        if not outcome.done():
            method(value)

    def run():
        try:
            method, value = outcome.set_result, function(*args)
        except Exception as error:
            method, value = outcome.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(settle, method, value)

    threading.Thread(target=run, daemon=True).start()
    return await outcome
