"""`python -m ustack` is the program `ustack`."""

from ustack.cli import main

if __name__ == "__main__":
    main()
