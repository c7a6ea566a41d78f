"""`python -m training.benchmark`."""

from .modes import main

if __name__ == "__main__":
    main()
