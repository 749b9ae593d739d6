"""`plphp` and `python -m plphp_cli`."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from plphp_cli.cli.app import main as run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
