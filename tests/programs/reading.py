"""FOLDER: read rows until that fails."""

import sys

from lumen import loader, windows
from lumen.errors import UserError

windows.RETRY_WAITS_SECONDS = (0.01, 0.01)
load = loader.Loader({"d": windows.Source(sys.argv[1], "train", 4096)}, 1, [[0, {"d": 1}]])
load.start(0, 0, 1, 8, 1)
try:
    for i in range(10**9):
        load.next()
        if i == 5:
            print("reading", flush=True)
except UserError as error:
    sys.exit(f"{error.code} {error.text}")
