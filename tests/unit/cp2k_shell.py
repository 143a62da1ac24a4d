"""Speaks as `cp2k.psmp -s` does, for one silicon dimer that costs nothing:  cp2k_shell.py [OUTPUT-LINE]

It writes its input where ASE tells it to, and OUTPUT-LINE into the output file that CP2K would write.
"""

import sys
from pathlib import Path


def lines_until_end() -> list[str]:
    return list(iter(lambda: next(sys.stdin).rstrip("\n"), "*END"))


def main() -> None:
    print("* READY", flush=True)
    for line in sys.stdin:
        word, *words = line.split()
        if word == "EXIT":
            return
        if word == "VERSION":
            print("CP2K Shell Version: 7.0")
        elif word == "WRITE_FILE":
            path = Path(next(sys.stdin).strip())
            path.write_text("\n".join(lines_until_end()[1:]) + "\n")
        elif word == "LOAD":
            Path(words[1]).write_text("\n".join(sys.argv[1:]) + "\n")
            print(1)
        elif word == "SET_CELL":
            [next(sys.stdin) for _ in range(3)]
        elif word == "SET_POS":
            lines_until_end()
            print(0.0)
        elif word == "GET_E":
            print(-210.0)
        elif word == "GET_F":
            print("6\n0.1 0 0\n-0.1 0 0\n* END")
        elif word == "GET_STRESS":
            print("0.1 0 0 0 0.1 0 0 0 0.1")
        print("* READY", flush=True)


main()
