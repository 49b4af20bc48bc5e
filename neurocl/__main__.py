"""``python -m neurocl``."""

from neurocl.cli.main import main

if __name__ == "__main__":
    main()
