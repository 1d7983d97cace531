"""`python -m dq.cli`: the same as `dq`."""

from dq.cli import main

if __name__ == "__main__":
    main()
