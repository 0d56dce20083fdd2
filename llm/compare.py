"""`python -m llm.compare`: see llm/analysis/compare.py."""

import sys

from llm.analysis.compare import main
from llm.training.run_directory import RunDirectoryError

if __name__ == "__main__":
    try:
        main()
    except (ValueError, RunDirectoryError) as error:
        sys.exit(f"error: {error}")
