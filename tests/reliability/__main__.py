"""The command."""

from .kills import main

if __name__ == "__main__":
    main()
