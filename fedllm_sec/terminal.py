"""Where prose goes."""

from rich.console import Console

console = Console(stderr=True)  # prose and progress; results go to stdout
