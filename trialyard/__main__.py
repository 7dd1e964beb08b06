"""``python -m trialyard`` is the command ``trialyard``."""

from search.program import main

if __name__ == "__main__":
    main()
