"""`python -m miles.cli` is miles-submit."""

from miles.cli.main import main

main()
