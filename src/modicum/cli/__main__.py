"""`python -m modicum.cli`: the same as the command `modicum`."""

from modicum.cli import main

main()
