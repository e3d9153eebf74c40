"""FOLDER: start a stream and fail for another reason, without closing it."""

import sys

from lumen import loader, windows

load = loader.Loader({"d": windows.Source(sys.argv[1], "train", 10)}, 1, [[0, {"d": 1}]])
load.start(0, 0, 1, 4, 1)
load.next()
raise ValueError("the trainer's")
