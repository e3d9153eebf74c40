"""FOLDER: read its thousands of shards with a hundred open files."""

import resource
import sys

from lumen import loader

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
loader.RETRY_WAITS_SECONDS = ()
source = loader.Source(sys.argv[1], "train", 7)
found = [int(source.window(i)[0]) for i in range(source.windows)]
assert found == list(range(0, source.windows * 7, 7))
