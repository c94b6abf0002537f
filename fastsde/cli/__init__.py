"""The command line. What the user got wrong raises an error that names the option; `main` makes a line of it."""
