"""Trees found on pictures from above, in one stage."""
