"""Pictures from the web, where `serve --allow-remote-images` lets requests name them.

In: an address. Out: its bytes, within bounds of size, time and redirects. Nothing that only this machine or its network
can reach is asked: a name is looked up once, all of its addresses are checked, and the connection goes to one of these.
"""

import ipaddress
import socket
import threading
import time

import httpx

REDIRECTS = 3
_WAIT = 5.0  # seconds without a byte
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """The address can't be read from; in words that follow it."""


def fetch(address: str, most: int, end: float) -> bytes:
    """Return what is at an address, `most` bytes at most, before `end` in monotonic time. Raises Refused."""
    try:
        url = httpx.URL(address)
        with httpx.Client(trust_env=False, timeout=_WAIT) as client:
            late = threading.Timer(max(0.0, end - time.monotonic()), client.close)  # a head may drip for ever
            late.daemon = True
            late.start()
            try:
                for _ in range(REDIRECTS + 1):
                    found = _get(client, url, most, end)
                    if isinstance(found, bytes):
                        return found
                    url = url.join(found)
            finally:
                late.cancel()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, UnicodeError) as error:
        if time.monotonic() > end:
            raise Refused("takes too long") from None
        raise Refused(f"can't be read ({str(error) or type(error).__name__:.100})") from None
    raise Refused(f"redirects over {REDIRECTS} times")


def _get(client: httpx.Client, url: httpx.URL, most: int, end: float) -> bytes | str:
    """The bytes there, or where it redirects to."""
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise Refused("leads to what is no plain http or https address")
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    there = url.copy_with(host=_public_address(url.host, port))
    headers = {"host": url.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
    asked = client.build_request("GET", there, headers=headers, extensions={"sni_hostname": url.host})
    response = client.send(asked, stream=True)
    try:
        if response.is_redirect:
            return response.headers["location"]
        if response.status_code != 200:
            raise Refused(f"answers with status {response.status_code}")
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > most:
                raise Refused(f"holds over {most // 10**6} MB")
            if time.monotonic() > end:
                raise Refused("takes too long")
        return bytes(body)
    finally:
        response.close()


def _public_address(host: str, port: int) -> str:
    """One of a host's addresses, if all of them are on the internet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise Refused("names a host that is not found") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused("leads to this machine or its own network, where nothing is read")
    return addresses[0]


def is_public(address: str) -> bool:
    """Returns True if an address is on the internet: not private, loopback, link-local, multicast or reserved."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, so link-local
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
