"""FOLDER: read rows until that fails."""

import sys

from lumen import loader
from lumen.errors import UserError

loader.RETRY_WAITS_SECONDS = (0.01, 0.01)
load = loader.Loader({"d": loader.Source(sys.argv[1], "train", 4096)}, 1, [[0, {"d": 1}]])
load.start(0, 0, 1, 8, 1)
try:
    for i in range(10**9):
        load.next()
        if i == 5:
            print("reading", flush=True)
except UserError as error:
    sys.exit(f"{error.code} {error.text}")
