"""`python -m hydra.testing path/to/my_attention.py:MyAttention` prints the card of a class."""

import sys

from hydra.attention.plan import parse_plan
from hydra.errors import ConfigError, HydraError
from hydra.testing.card.check import check_attention

USAGE = "usage: python -m hydra.testing 'path.py:Class(option=value)' (or the name of a backend)\n"


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 everything holds, 1 something does not, 2 there is no such class."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write(USAGE)
        return 2
    try:
        (name, options), *others = parse_plan(arguments[0])
        if others:
            raise ConfigError(f"one attention must be named, but got a plan of several in {arguments[0]!r}")
        card = check_attention(name, options=options)
    except HydraError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{card}\n")
    return 0 if card.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
