"""python -m hpcft"""

from hpcft.cli.main import main

main()
