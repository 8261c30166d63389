"""`python -m hov2.tools.report`."""

from hov2.tools.report import main

main()
