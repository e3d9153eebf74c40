"""FILE: say much, then write `done` into FILE."""

import sys

from lumen import launch


def main(argv):
    for i in range(3000):
        print("caf\u00e9 \u2192 \udce9", i)
    print("still here", file=sys.stderr)
    with open(argv[0], "w") as f:
        f.write("done")


launch.command(main, lasting=True)
