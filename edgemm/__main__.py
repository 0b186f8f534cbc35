"""`python -m edgemm`."""

from edgemm.cli import main

main()
