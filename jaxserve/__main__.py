"""`python -m jaxserve` is the command `jaxserve`, also where no folder of scripts is on PATH."""

from jaxserve.cli.main import main

if __name__ == "__main__":
    main(prog_name="jaxserve")
