"""A port for ranks to meet at."""

import random
import socket

# What systems leave to applications. Of the ports above, one that was free a second ago may be anybody's now: they are
# handed out for outgoing connections, and ranks take their time until they listen.
LOWEST, PORTS = 15_000, 15_000


def free_port() -> int:
    """One on which nobody listens at the moment."""
    ports = list(range(LOWEST, LOWEST + PORTS))
    random.SystemRandom().shuffle(ports)  # not by a seed: several runs may start at the same moment
    return next(filter(_is_free, ports))


def _is_free(port: int) -> bool:
    with socket.socket() as found:
        try:
            found.bind(("", port))
        except OSError:
            return False
        return True
