"""FOLDER: own it, and do nothing with it."""

import sys
import time

from lumen import owner as owners

owner = owners.Owner(sys.argv[1])
owner.take()
print("mine", flush=True)
time.sleep(99)
