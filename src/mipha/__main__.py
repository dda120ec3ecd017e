"""`python -m mipha`, which is what `torchrun -m mipha` runs."""

from mipha.cli import main

if __name__ == "__main__":
    main()
