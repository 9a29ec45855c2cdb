"""`python -m deploy.local.suite trixie`: makes the RabbitMQ of that Debian ready for use, and tells its version.

Exit status 75, with the reason, if it cannot be had here.
"""

from __future__ import annotations

import sys

from deploy.local.console import say
from deploy.local.native_broker import of_suite
from deploy.local.server import Unavailable

EXIT_UNAVAILABLE = 75


def main() -> int:
    (suite,) = sys.argv[1:]
    try:
        say(f"{of_suite(suite).name} can run here")
    except Unavailable as error:
        say(f"NO RABBITMQ OF DEBIAN {suite}: {error}")
        return EXIT_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
