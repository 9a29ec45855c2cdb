"""`python -m worker` is `model-manager`."""

from worker.cli import main

if __name__ == "__main__":
    main()
