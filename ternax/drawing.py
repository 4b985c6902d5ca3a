"""matplotlib where it is installed; everything works without."""

MISSING = "a plot needs matplotlib: pip install 'ternax[plots]'"


def pyplot():
    """matplotlib.pyplot drawing into files, or None."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def said(picture) -> str:
    """What stands behind "wrote results.json": the picture, or what it takes to have one."""
    if picture:
        return f" and {picture}"
    return "" if pyplot() else f"; {MISSING}"  # nothing to draw, or nothing to draw with
