"""`python -m app` is the `stillstream` command."""

from app.cli import main

main()
