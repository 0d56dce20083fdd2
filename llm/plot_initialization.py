"""`python -m llm.plot_initialization`: see llm/analysis/plot_initialization.py."""

import sys

from llm.analysis.plot_initialization import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
