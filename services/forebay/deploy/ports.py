"""Loopback ports: asking for free ones, and saying early which one is taken."""

from __future__ import annotations

import errno
import socket

from forebay.core.errors import ConfigurationError

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on at this moment."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for item in sockets:
            item.bind((LOOPBACK, 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def check_port(host: str, port: int) -> None:
    """Raises ConfigurationError when `port` cannot be listened on."""
    if not 1 <= port <= 65535:
        raise ConfigurationError(f"port {port} is not in 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except PermissionError:
            raise ConfigurationError(f"port {port} needs more rights than this user has") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigurationError(f"port {port} is in use") from None
            raise ConfigurationError(f"{host}:{port}: {error.strerror}") from error
