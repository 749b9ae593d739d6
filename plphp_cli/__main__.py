"""`plphp` and `python -m plphp_cli`."""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        from plphp_cli.cli.app import main as run_command_line

        code = run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        # Before the command line could take care of it: while Python was importing.
        sys.stderr.write("error: interrupted\n")
        code = 130
    # All is written: a late Ctrl-C would only tear Python's own clean-up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hub = sys.modules.get("plphp_cli.models.hub")
    if hub is not None and hub.leaves_downloads():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
