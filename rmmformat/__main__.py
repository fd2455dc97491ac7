"""``python -m rmmformat`` is ``rmm``."""

from rmmformat.cli.main import main

if __name__ == "__main__":
    main(prog_name="rmm")
