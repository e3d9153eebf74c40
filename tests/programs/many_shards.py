"""FOLDER: read its thousands of shards with a hundred open files."""

import resource
import sys

from lumen import windows

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
windows.RETRY_WAITS_SECONDS = ()
source = windows.Source(sys.argv[1], "train", 7)
found = [int(source.window(i)[0]) for i in range(source.windows)]
assert found == list(range(0, source.windows * 7, 7))
