"""Who may use the server: API keys, the clients that they stand for, and the names in the Host header.

A server that other machines reach needs a key. With a key, each client sees and cancels its own requests alone.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness.config.serve import ServeConfig
from harness.config.yaml import ConfigError

KEY_VARIABLE = "TRIPTYCH_API_KEY"
KEY_CLIENT = "key:"  # the beginning of every client's name on a server with keys
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")


class AccessKeys:
    """The API keys of a server, kept as hashes.

    Args:
        names: The name of the client of each key.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = [(_digest(key.encode()), name) for key, name in names.items()]

    def client(self, authorization: str) -> str | None:
        """Return the client that a header Authorization names, in a time that does not depend on the key.

        Args:
            authorization: The value of the header, such as `Bearer KEY`.

        Returns:
            The client as `key:NAME`, or None if the key is wrong or missing.
        """
        scheme, _, given = authorization.partition(" ")
        found, digest = None, _digest(given.strip().encode("latin-1", "replace"))
        for known, name in self._names:
            found = name if hmac.compare_digest(known, digest) else found
        return None if found is None or scheme.lower() != "bearer" else f"{KEY_CLIENT}{found}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(serve: ServeConfig) -> AccessKeys | None:
    """Read the keys of a server, before anything is started.

    Args:
        serve: The server's configuration.

    Returns:
        The keys, or None for a server on loopback without keys.

    Raises:
        ConfigError: Other machines reach the server and it has no key, or a key, its file or a host is wrong.
    """
    wrong = [name for name in serve.allowed_hosts if host_name(name) is None or name.rpartition(":")[2].isdecimal()]
    if wrong:
        raise ConfigError(f"serve.allowed_hosts has {wrong[0]!r}; give names without scheme and port: gpu1.example.org")
    names: dict[str, str] = {}
    if serve.api_key_file is not None:
        names.update(_named_keys(Path(serve.api_key_file)))
    if KEY_VARIABLE in os.environ:
        key = _checked(os.environ[KEY_VARIABLE], KEY_VARIABLE)
        names.setdefault(key, "environment")
    if not names and not is_loopback(serve.host):
        raise ConfigError(
            f"serve.host={serve.host} lets other machines in without a key; set serve.api_key_file or {KEY_VARIABLE}, "
            "or use serve.host=127.0.0.1"
        )
    return AccessKeys(names) if names else None


def _named_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each key of a file with the name of its client, which is the number of its line unless it has one."""
    where = f"serve.api_key_file={path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, encoding="utf-8") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{where} is no file; give a file with one key a line")
            if mode & 0o077:
                raise ConfigError(f"{where} can be read by others (mode {mode & 0o777:o}); run chmod 600 on it")
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}); give a file with one key a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text; write one key a line") from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, key = line.strip().partition(":") if ":" in line else (str(number), "", line.strip())
        key = _checked(key, f"line {number} of {where}")
        if colon and not NAME.fullmatch(name):
            raise ConfigError(f"line {number} of {where} has the name {name!r}; use letters, digits, dots and dashes")
        if key in seen:
            raise ConfigError(f"line {number} of {where} repeats a key; give each client its own")
        seen.add(key)
        yield key, name
    if not seen:
        raise ConfigError(f"{where} has no key; write one a line")


def _checked(key: str, where: str) -> str:
    """Return a key if a header can carry it; the message does not repeat it."""
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{where} is no key; write visible ASCII characters without spaces")
    return key


def host_name(header: str) -> str | None:
    """Return the name or address in a Host header without its port, or None if it is not one."""
    found = HOST.fullmatch(header)
    return None if found is None else found[1].strip("[]").lower()


def is_loopback(name: str) -> bool:
    """Return whether a name or an address is this machine's loopback."""
    address = _address(name)
    return name.lower() == "localhost" if address is None else address.is_loopback


def is_allowed_host(name: str, serve: ServeConfig, own: str) -> bool:
    """Return whether clients may reach the server by this name.

    A page of another site can point its own name at this machine (DNS rebinding), but it cannot change the name that
    its requests carry.

    Args:
        name: The name in the Host header, without its port.
        serve: The server's configuration.
        own: The server's address on this connection.
    """
    if is_loopback(name) or name in (host.lower() for host in (serve.host, *serve.allowed_hosts)):
        return True
    address = _address(name)
    return address is not None and address == _address(own)


def address_group(address: str) -> str:
    """Return the address by which connections are counted: in IPv6 one client has a whole /64."""
    found = _address(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((found, 64), strict=False))
    return address if found is None else str(found)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return found if mapped is None else mapped
