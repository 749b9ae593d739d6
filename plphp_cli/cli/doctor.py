"""`plphp doctor`: the environment in a form to paste into a bug report, with a hint per problem."""

from plphp_cli.cli import options as opt
from plphp_cli.cli.output import say, stdout_width, write_report
from plphp_cli.doctor import examine
from plphp_cli.reports.doctor import doctor_report


def doctor(
    json: opt.JsonOption = None, force: opt.ForceOption = False, debug: opt.DebugOption = False
) -> int:
    """Print the environment in a form to paste into a bug report, with a hint per problem.

    It imports what plphp needs, and lets the built-in model answer, in a process of its own.

    No tokens or passwords are printed; the home folder is `~`. Exit code 1: nothing can be run.
    """
    opt.check_json_target(json, force)
    say("looking: imports torch and transformers, and runs the built-in model (about 20 s)")
    record = examine()
    write_report(record, doctor_report(record, stdout_width()), json, force)
    return 0 if record.usable else 1
