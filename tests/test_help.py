"""The help of all commands speaks one language."""

import typer

from plphp_cli.cli.app import app


def options():
    """Each option of each command: the command's name, the option's, and how its value is shown."""
    root = typer.main.get_command(app)
    for name, command in (("plphp", root), *root.commands.items()):
        context = command.make_context(name, [], resilient_parsing=True)
        for option in command.get_params(context):
            if option.param_type_name == "option":
                yield name, max(option.opts, key=len), option.metavar, option.is_flag


def test_flags_show_no_value_and_everything_else_does():
    for command, option, metavar, flag in options():
        assert (metavar == "") == flag, (command, option, metavar)
        assert metavar is not None, (command, option)


def test_an_option_shows_the_same_value_in_every_command():
    shown = {}
    for command, option, metavar, _ in options():
        # The sweep takes several where others take one.
        shown.setdefault(option, {}).setdefault(metavar.removesuffix("..."), []).append(command)
    # A sweep writes a folder, a calibration a file.
    assert [option for option, found in shown.items() if len(found) > 1] == ["--out"]
