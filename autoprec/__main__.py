"""Run the command line with `python -m autoprec`."""

from autoprec.cli.main import main

if __name__ == "__main__":
    main()
