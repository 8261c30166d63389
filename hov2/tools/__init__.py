"""What a user runs beside the scripts: `python -m hov2.tools` lists them."""
