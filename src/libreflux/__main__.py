"""`python -m libreflux`: the same as the `libreflux` command."""

from libreflux.cli import main

if __name__ == "__main__":
    main()
