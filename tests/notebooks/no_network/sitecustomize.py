"""With this folder on PYTHONPATH no Python process opens an internet socket; NETWORK_LOG tells who ran and tried."""

import os
import socket
import sys
import traceback

INTERNET = (socket.AF_INET, socket.AF_INET6)
LOG = os.environ["NETWORK_LOG"]


def note(text: str) -> None:
    with open(LOG, "a") as log:
        log.write(f"{text}\n")


class RefusingSocket(socket.socket):
    def __init__(self, family: int = -1, *arguments: object, **options: object) -> None:
        if family in (-1, *INTERNET):
            refuse("socket")
        super().__init__(family, *arguments, **options)  # type: ignore[arg-type]


def refuse(what: str, *arguments: object, **options: object) -> None:
    note(f"REFUSED {what}{arguments} {''.join(traceback.format_stack(limit=6))}")
    raise PermissionError(f"{what} is refused: no test opens the network")


socket.socket = RefusingSocket  # type: ignore[misc]
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, lambda *arguments, name=name, **options: refuse(name, *arguments))
note(f"RAN {' '.join(sys.orig_argv)}")
