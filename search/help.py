"""What `trialyard --help` looks like: commands in groups; and `-v` after a command, too.

Not with Typer's panels: to import what draws them takes as long as all the rest of `--help`.
"""

from typing import Any

from typer.core import TyperGroup

START, LOOK, TAKE_AWAY, OPERATE, DATABASE = GROUPS = ("Start", "Look", "Take away", "Operate", "Database")
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """A program, or a group of commands: its help has a section for each of the GROUPS."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, which also takes the program's option ``--verbose``."""
        command = super().get_command(ctx, cmd_name)
        verbose = next(option for option in ctx.find_root().command.params if option.name == "verbose")
        if command is not None and verbose not in command.params:
            command.params = [*command.params, verbose]
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each group, in the order of GROUPS."""
        names = self.list_commands(ctx)
        width = max(map(len, names))
        commands = [self.commands[name] for name in names]
        for group in (*GROUPS, None):
            rows = [
                (str(command.name).ljust(width), command.get_short_help_str(formatter.width - width - 6))
                for command in commands
                if getattr(command, "rich_help_panel", None) == group
            ]
            if rows:
                with formatter.section(group or "Commands"):
                    formatter.write_dl(rows)
