"""The command line: `main` dispatches, `commands` has what each command does, `help` its keys."""
