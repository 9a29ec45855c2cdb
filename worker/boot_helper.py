"""A process that helps a boot of the registry: it extracts what the catalog takes, chunk by chunk, and ends with it.

python -m worker.boot_helper FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from worker.catalog.extracts import extract
from worker.catalog.records import IndexedRecord
from worker.journal.helpers import help_boot

if __name__ == "__main__":
    help_boot(Path(sys.argv[1]), IndexedRecord, extract)
