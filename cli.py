"""Run the command line from a checkout: `python cli.py tune model.py`."""

from autoprec.cli.main import main

if __name__ == "__main__":
    main()
