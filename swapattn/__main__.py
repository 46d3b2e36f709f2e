"""`python -m swapattn`: the command line where no script of it is on the path."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="swapattn")
