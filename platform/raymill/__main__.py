"""`python -m raymill`."""

from raymill.cli import main

if __name__ == "__main__":
    main()
