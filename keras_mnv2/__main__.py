"""Starts the command line."""

import sys

from keras_mnv2.cli import main

if __name__ == "__main__":
    sys.exit(main())
