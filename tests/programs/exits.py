"""WORD: end as a command of ours does when it meets that."""

from lumen import errors, launch


def main(argv):
    if argv == ["user"]:
        raise errors.UserError("E114", "x.npy:3: 12 tokens; 65 needed")
    if argv == ["diverged"]:
        raise errors.UserError("E301", "step 7")
    if argv == ["bug"]:
        raise RuntimeError("ours")
    if argv == ["interrupt"]:
        raise KeyboardInterrupt
    return int(argv[0])


launch.command(main)
